"""PMM's cyclic pseudo masks."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from .. import config as configuration
from .. import data, files, models, train
from ..processes import processes, together
from ..store import Store
from .predict import PredictConfig, predict_masks


def train_cycle(
    source: data.Source,
    config: train.SegmentationConfig,
    out: str | Path,
    *,
    labels=None,
    weights: str | Path | None = None,
    validation: data.Source | None = None,
    prediction: PredictConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], Callable[[int, int, str], None] | None] = lambda stage: None,
    begun: Callable[[dict[str, str]], None] | None = None,
) -> Path:
    """PMM's cyclic pseudo masks: a segmenter is trained in OUT/first, predicts the images that it was trained on
    (OUT/first/masks), and another one is trained on these from the start, in OUT, without pretended under-fitting.

    Arguments as of train.train_segmenter. prediction: None: PredictConfig.multi(). resume: goes on where it was
    stopped. overwrite: replaces what is there. progress: of a stage's name, what it reports to.
    """
    out, folder, prediction = Path(out), Path(out) / "first", prediction or PredictConfig.multi()
    if prediction.shard is not None:
        raise ValueError(f"train_cycle: expected a prediction of all images, got shard {prediction.shard}")
    if resume and not folder.exists() and train.is_begun(out):
        raise configuration.AnotherRun(f"train_cycle: expected to go on with a cycle, got {out}, where a training "
                                       f"without one began; choose another folder", ["training"])  # fmt: skip
    if not resume and not overwrite:
        train.refuse_begun("train_cycle", out)
    given, store = dict(weights=weights, validation=validation, resume=resume, overwrite=overwrite), Store(folder)
    path = folder / "prediction.json"
    with processes(config.device) as here:

        def start(inputs: dict[str, str]) -> None:
            if here.rank == 0 and not resume:  # what an earlier cycle left would be taken for this one's
                train.clear_segmenter(out)
                for name in store.mask_names():
                    store.mask_path(name).unlink()
            if begun is not None:
                begun(inputs)

        checkpoint = train.train_segmenter(source, config, folder, labels=labels, progress=progress("first"),
                                           scanned=progress("scan"), begun=start, **given)  # fmt: skip
        prediction = dataclasses.replace(prediction, device=str(here.device))
        beside = {"checkpoint": files.digest(checkpoint)}
        if path.is_file():
            there = json.loads(path.read_text("utf-8"))
            found = configuration.differences(prediction, there["config"], ("device", "workers", "batch"))
            found += ["network"] * (there["checkpoint"] != beside["checkpoint"])
            if found and store.mask_names():
                raise configuration.AnotherRun(
                    f"train_cycle: expected to go on in {folder} as it began, got another {', '.join(found)}; remove "
                    f"{store.masks}, or choose another folder", found
                )  # fmt: skip
        together(here)
        if here.rank == 0:
            configuration.write(path, prediction, **beside)
        made = predict_masks(source, models.open_segmenter(checkpoint), store, prediction, progress=progress("masks"))
        failed = {name: reason for part in together(here, made.failed) for name, reason in part.items()}
        if failed:
            name, reason = next(iter(failed.items()))
            raise ValueError(f"train_cycle: expected a mask of every image, got none of {len(failed)}, {name} for one: "
                             f"{reason}; mend it and go on with resume")  # fmt: skip
        last = dataclasses.replace(config, under_fitting=None)
        return train.train_segmenter(source, last, out, labels=store.masks, progress=progress("last"),
                                     scanned=progress("scan again"), **given)  # fmt: skip
