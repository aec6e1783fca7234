"""The end of a run: exports the result, and records the outcome."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from utils.config.options import Diverged, WrongExport
from utils.evaluation.judging import LEARNING
from utils.sampling.samples import Sample
from utils.training.card_facts import CardFacts
from utils.training.data import TrainingData
from utils.training.description import card_settings
from utils.training.exchange import record_outcome
from utils.training.model_card import publish
from utils.training.options import TrainingOptions
from utils.training.session import Session
from utils.training.state import TrainingState, evaluating
from utils.training.validation import ValidationLoss
from utils.training.verification import draw_reference, verify, wrong_export

logger = logging.getLogger(__name__)


@contextmanager
def exported_weights(
    options: TrainingOptions, session: Session, state: TrainingState, validation: ValidationLoss
) -> Iterator[None]:
    """Context manager: exports the result, and keeps its weights (averaged, if so chosen) in the trained modules."""
    averages = state.averages
    if state.lengths is not None:
        averages = [validation.choose_length(options.ema.ema_lengths, state.lengths)]
    with evaluating(state.adaptation, averages, state.optimizer):
        state.judge()
        logger.info("writing the result to %s", session.folder.path)
        state.export(session.folder.path)
        draw_reference(options, session, state)
        yield


def finish(
    options: TrainingOptions,
    session: Session,
    data: TrainingData,
    state: TrainingState,
    facts: CardFacts,
    samples: Sequence[Sample],
) -> None:
    """Checks the result, writes the final reports, uploads it if requested, and logs the outcome of the run.

    Args:
        facts: content of the model card.
        samples: samples of the result.

    Raises:
        Diverged: if the run has diverged, once all processes are done.
        WrongExport: if the files of the result do not hold its weights.
    """
    if session.requests.is_asked:
        logger.warning("a signal interrupted the last samples; the exported result is complete")
    data.share_unreadable()
    data.write_report()
    verify(session, state)
    wrong = wrong_export(session, state)
    # The outcome, in `run.json` and `verdict.json`; then the model card.
    judged = record_outcome(session, state, state.verdict, samples)
    if session.accelerator.is_main_process:
        whole = replace(
            facts,
            is_dora=state.adaptation.is_dora,
            load_arguments=state.adaptation.exporter.form.load_arguments,
            settings=card_settings(options, data, state.step),
            verdict=state.verdict,
            judgement="" if judged is None else judged.line,
            failures=[wrong] if wrong else [],
            is_misread=bool(state.adaptation.exporter.misread),
        )
        publish(session.folder.path, session.repository, options.hub, whole, samples)
    # The outcome in the log and as exit status.
    folder = session.folder.path
    if judged is not None:
        logger.log(logging.INFO if judged.word == LEARNING else logging.WARNING, "verdict: %s", judged.line)
    if state.verdict:
        raise Diverged(
            f"the run has diverged: {state.verdict}; its result is in {folder} anyway; lower --learning_rate, or "
            "resume from an earlier checkpoint"
        )
    if wrong:
        raise WrongExport(f"the result in {folder} is not what was trained: {wrong}; the checkpoints hold the run")
    logger.info("the result is in %s", folder)
