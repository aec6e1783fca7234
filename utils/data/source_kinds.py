"""The table of source kinds for folders; importing it loads no heavy libraries.

To add a kind, write a function and add it here. The function takes the source's options, `--cache_dir`, the folder's
listing and whether folders name classes. It returns a `FolderContent`: the images with captions, and how each file was
used.
"""

from utils.config.late import Late

SOURCES: dict[str, Late] = {
    "imagefolder": Late("utils.data.sources", "read_image_folder"),
    "pairs": Late("utils.data.sources", "read_pairs"),
    "captions_json": Late("utils.data.sources", "read_captions_json"),
    "parquet": Late("utils.data.sources", "read_parquet"),
    "webdataset": Late("utils.data.sources", "read_webdataset"),
}
