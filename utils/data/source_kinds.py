"""The kinds of sources in a folder: a row for each, known without loading anything heavy.

A new kind is a function and a row here. The function takes a source's options, `--cache_dir`, the folder's listing and
whether folders name classes, and returns a `FolderContent`: the images with their captions, and what became of files.
"""

from utils.config.late import Late

SOURCES: dict[str, Late] = {
    "imagefolder": Late("utils.data.sources", "read_image_folder"),
    "pairs": Late("utils.data.sources", "read_pairs"),
    "captions_json": Late("utils.data.sources", "read_captions_json"),
    "parquet": Late("utils.data.sources", "read_parquet"),
    "webdataset": Late("utils.data.sources", "read_webdataset"),
}
