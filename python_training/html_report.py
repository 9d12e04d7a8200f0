"""A run's folder as one HTML file: curves, health of the adversarial training, figures of the folds, settings.

The file needs no network and no script.  What a run has not written is named where it would stand.
"""

from __future__ import annotations

import html
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.inference.whole_files import write_bytes

from . import charts
from .charts import Cloud, Line
from .evaluation import MODELS, Fold, fold_rates, read_folds, summarize
from .run_folder import PARTS, Series, Stage, flatten, read_object, read_stages

DRAWN_POINTS = 800


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the folder ``run`` to ``out`` (``report.html`` in it by default) and return its path.

    Raises ValueError when the folder has none of a run's files, or naming the file that cannot be read.
    """
    run = Path(run)
    out = Path(out) if out is not None else run / "report.html"
    if not any((run / part).exists() for part in PARTS):
        raise ValueError(f"{run}: expected the folder of a run ({', '.join(PARTS)}), got none of these")
    settings, environment = read_object(run / "settings.json"), read_object(run / "environment.json")
    stages = read_stages(run / "log.jsonl", run / "epochs.jsonl", str((settings or {}).get("stage", "")))
    folds = read_folds(run / "evaluation")
    by_protocol = {p: [f for f in folds if f["protocol"] == p] for p in sorted({f["protocol"] for f in folds})}
    evaluations = [summarize(some) for some in by_protocol.values()]
    validation = read_object(run / "validation.json") or {}
    labels = evaluations[0]["labels"] if evaluations else validation.get("labels", [])
    banner = _banner(folds)
    sections = [
        ("curves", "Curves", _curves(stages)),
        ("adversarial", "Health of the adversarial training", _health(stages)),
        ("results", "Results", _results(evaluations, banner, validation)),
        ("embeddings", "Embeddings before and after adaptation", _embeddings(run / "embeddings.npz", labels)),
        ("folds", "Folds", _folds(by_protocol)),
        ("settings", "Settings", _values(settings, "settings.json")),
        ("environment", "Environment", _values(environment, "environment.json")),
    ]
    page = _page(_head(run, settings or {}, environment or {}, stages, evaluations, banner), sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, page.encode("utf-8", "replace"))  # half a surrogate pair in a name must not lose the report
    return out


def principal_plane(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two first principal components (n, 2) of centred (n, d) features and their shares of the variance."""
    centred = features - features.mean(0)
    # R of a QR decomposition has the singular values and right vectors of the whole, at a fraction of its cost.
    _, sizes, basis = np.linalg.svd(np.linalg.qr(centred, mode="r"), full_matrices=False)
    basis = basis[:2] * np.where(np.take_along_axis(basis[:2], np.abs(basis[:2]).argmax(1)[:, None], 1) < 0, -1.0, 1.0)
    points, shares = centred @ basis.T, sizes[:2] ** 2 / max(float((sizes**2).sum()), 1e-300)
    pad = 2 - len(shares)
    return np.pad(points, ((0, 0), (0, pad))), np.pad(shares, (0, pad))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _rate(value: float | None, std: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" + (f" ± {std:.1f}" if std is not None else "")


def _model(name: str) -> str:
    return MODELS.get(name, name)


def _missing(sentence: str) -> str:
    return f'<p class="missing">{_text(sentence)}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int, strong: str = "") -> str:
    """A table with the cells' texts, from column ``numbers`` on set to the right; rows with ``strong`` stand out."""

    right = ' class="n"'

    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(f"<{tag}{right if k >= numbers else ''}>{_text(cell)}</{tag}>" for k, cell in enumerate(row))

    stand_out = ' class="strong"'
    body = "".join(f"<tr{stand_out if strong and strong in row else ''}>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, chart: str, key: str, caption: str = "") -> str:
    caption = f"<p>{_text(caption)}</p>" if caption else ""
    return f"<figure><figcaption>{_text(title)}</figcaption>{chart}{key}{caption}</figure>"


def _lines(
    series: Series, shown: Mapping[str, tuple[str, int]], scale: float = 1.0, log: bool = False
) -> tuple[list[Line], list[str]]:
    """The series of ``shown`` (key to text and style) that can be drawn, and a sentence for each that lost values."""
    lines, notes = [], []
    for name, (text, style) in shown.items():
        if name not in series:
            continue
        x, y, lost = series[name]
        if lost:
            notes.append(f"{lost:,} values of {text} were not finite.")
        if log and (y <= 0).any():
            notes.append(f"{int((y <= 0).sum()):,} values of {text} were 0 or less, which a log axis cannot show.")
            x, y = x[y > 0], y[y > 0]
        if len(x):
            lines.append(Line(text, x, y * scale, style))
    return lines, notes


def _chart(
    title: str,
    series: Series,
    shown: Mapping[str, tuple[str, int]],
    *,
    y_label: str,
    x_label: str = "step",
    scale: float = 1.0,
    log: bool = False,
    caption: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    reference: tuple[float, str] | None = None,
    marks: Sequence[float] = (),
) -> str | None:
    """A figure of lines with its key; None where nothing was logged."""
    lines, notes = _lines(series, shown, scale, log)
    if not lines and not notes:
        return None
    key = [(charts.line_swatch(line.style, len(lines) > 1), line.label) for line in lines]
    if reference:
        key.append((charts.class_swatch("reference"), reference[1]))
    if len(marks):
        key.append((charts.class_swatch("mark"), "epoch with a warning"))
    if any(len(line.x) > charts.BINS for line in lines):
        notes.append("Line: mean of neighbouring steps; band: their range.")
    chart = ""
    if lines:
        chart = charts.line_chart(
            lines, title=title, x_label=x_label, y_label=y_label + (", log axis" if log else ""),
            x_range=x_range, y_range=y_range, log=log, reference=reference[0] if reference else None, marks=marks,
        )  # fmt: skip
    return _figure(title, chart, charts.key(key) if lines else "", " ".join([caption, *notes]).strip())


def _spread_wide(series: Series, names: Iterable[str]) -> bool:
    """Whether a linear axis would press most of the values against its bottom."""
    values = [series[name][1] for name in names if name in series and len(series[name][1])]
    together = np.concatenate(values) if values else np.ones(1)
    return bool(together.min() > 0 and together.max() > 50 * np.median(together))


LOSSES = {"loss": ("total", 3), "speech_loss": ("speech", 0), "face_loss": ("face", 1), "domain_loss": ("domain", 2)}
ACCURACIES = {"speech_accuracy": ("speech", 0), "face_accuracy": ("face", 1)}


def _curves(stages: Mapping[str, Stage]) -> str:
    if not any(stage.log or stage.epochs for stage in stages.values()):
        return _missing("This run has no log.jsonl and no epochs.jsonl with values, so there are no curves.")
    parts = []
    for name, stage in stages.items():
        figures = {
            "loss": _chart(
                "Loss", stage.log, LOSSES, y_label="loss (nats)", log=_spread_wide(stage.log, LOSSES)
            ),
            "accuracy": _chart(
                "Accuracy in training", stage.log, ACCURACIES, y_label="accuracy (%)", scale=100, y_range=(0, 100)
            ),
            "learning rate": _chart("Learning rate", stage.log, {"lr": ("learning rate", 0)}, y_label="learning rate"),
            "validation": _chart(
                "Validation", stage.epochs, {"validation_ua": ("UA", 0), "validation_wa": ("WA", 1)},
                y_label="rate (%)", x_label="epoch", scale=100, caption=_best(stage),
            ),
            "validation loss": _chart(
                "Validation loss", stage.epochs, {"validation_loss": ("loss", 3)}, y_label="loss (nats)",
                x_label="epoch", log=_spread_wide(stage.epochs, ["validation_loss"]),
            ),
        }  # fmt: skip
        if len(stages) > 1:
            parts.append(f"<h3>Stage {_text(name)}</h3>")
        parts.append(f'<div class="figures">{"".join(f for f in figures.values() if f)}</div>')
        absent = [what for what, figure in figures.items() if not figure]
        if absent:
            parts.append(_missing(f"Not logged: {', '.join(absent)}."))
    return "".join(parts)


def _best(stage: Stage) -> str:
    if "validation_ua" not in stage.epochs or not len(stage.epochs["validation_ua"][0]):
        return ""
    epochs, values, _ = stage.epochs["validation_ua"]
    return f"Highest UA: {100 * values.max():.1f} % after epoch {epochs[values.argmax()]:.0f}."


def _over_steps(stage: Stage, name: str) -> Series:
    """A series of epochs over the steps at which they ended, where these are known."""
    if name not in stage.epochs or not stage.by_step:
        return {name: stage.epochs[name]} if name in stage.epochs else {}
    epochs, steps, _ = stage.epochs["step"]
    x, y, lost = stage.epochs[name]
    return {name: (steps[np.searchsorted(epochs, x)], y, lost)}


def _health(stages: Mapping[str, Stage]) -> str:
    adversarial = {name: stage for name, stage in stages.items() if stage.is_adversarial}
    parts = []
    for name, stage in adversarial.items():
        if len(adversarial) > 1:
            parts.append(f"<h3>Stage {_text(name)}</h3>")
        marks = sorted({step for _, step, _ in stage.warnings}) if stage.by_step else []
        steps = np.concatenate([x for x, _, _ in stage.log.values()] + [marks])
        if stage.by_step and "step" in stage.epochs:
            steps = np.append(steps, stage.epochs["step"][1])
        span = (float(steps.min()), float(steps.max())) if len(steps) else None
        ratio = stage.log if "gradient_ratio" in stage.log else _over_steps(stage, "gradient_ratio")
        figures = {
            "lambda": _chart(
                "Strength of the reversed gradient", stage.log, {"lambda": ("lambda", 0)}, y_label="lambda",
                x_range=span, marks=marks,
                caption="How much of the domain head's gradient reaches the encoder, its sign turned.",
            ),
            "domain accuracy": _chart(
                "Accuracy of the domain head", stage.log, {"domain_accuracy": ("domain head", 2)},
                y_label="accuracy (%)", scale=100, x_range=span, y_range=(0, 100),
                reference=(50, "50 %: guessing"), marks=marks,
                caption="Near 50 % the head cannot tell speech from faces, be it that the features are alike or that "
                "the head has stopped learning; the fresh probe tells which.",
            ),
            "gradient ratio": _chart(
                "Gradient norms in the encoder", ratio, {"gradient_ratio": ("ratio", 0)},
                y_label="gradient-norm ratio", log=True, x_range=span, reference=(1, "1: equal pull"), marks=marks,
                caption="Domain loss against emotion loss: far above 1 the adversary drowns the emotions, far below 1 "
                "it does nothing.",
            ),
            "fresh probe": _chart(
                "Fresh linear probe", _over_steps(stage, "probe_accuracy"), {"probe_accuracy": ("probe", 1)},
                y_label="accuracy (%)", x_label="step" if stage.by_step else "epoch", scale=100,
                x_range=span if stage.by_step else None, y_range=(0, 100),
                reference=(50, "50 %: guessing"), marks=marks,
                caption="A linear classifier of the domain, trained afresh on the frozen features: what they still "
                "give away, whatever the domain head says.",
            ),
        }  # fmt: skip
        parts.append(f'<div class="figures">{"".join(f for f in figures.values() if f)}</div>')
        absent = [what for what, figure in figures.items() if not figure]
        if absent:
            parts.append(_missing(f"Not logged: {', '.join(absent)}."))
    if not adversarial:
        parts.append(_missing("This run has logged no lambda, domain accuracy, gradient ratio or probe."))
    return "".join(parts) + _warning_list(stages)


def _warning_list(stages: Mapping[str, Stage]) -> str:
    items = []
    for name, stage in stages.items():
        epochs: dict[str, list[int]] = {}
        for epoch, _, text in stage.warnings:
            epochs.setdefault(text, []).append(epoch)
        where = f" of {name}" if len(stages) > 1 else ""
        items += [f"<li><b>{_text(_epochs(each) + where)}:</b> {_text(text)}</li>" for text, each in epochs.items()]
    if items:
        return f'<h3>Warnings</h3><ul class="warnings">{"".join(items)}</ul>'
    if any(stage.epochs for stage in stages.values()):
        return "<p>No epoch gave a warning.</p>"
    return _missing("This run has no epochs.jsonl with values, so no warnings are known.")


def _epochs(numbers: Sequence[int]) -> str:
    """Text like Epoch 3 or Epochs 3–6, 9."""
    ranges: list[list[int]] = []
    for n in sorted(set(numbers)):
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    text = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in ranges)
    return f"Epoch{'s' if len(set(numbers)) > 1 else ''} {text}"


def _banner(folds: Sequence[Fold]) -> str:
    shared = sum(fold["shares_speakers"] for fold in folds)
    if not shared:
        return ""
    return (
        f'<p class="banner" role="note"><strong>NOT speaker-independent:</strong> in {shared} of {len(folds)} folds '
        "speakers of the test part were heard in training; these rates say nothing about speakers that are new.</p>"
    )


NO_FOLDS = "This run has no folds (*-seed*.json) in evaluation, so there are no "


def _results(evaluations: Sequence[dict[str, Any]], banner: str, validation: Mapping[str, Any]) -> str:
    if not evaluations and validation.get("stages"):
        matrices = [
            _matrix(f"{_model(name)}, epoch {entry['epoch']}", entry["confusion"], validation["labels"])
            for name, entry in validation["stages"].items()
        ]
        return (
            "<p>This run has no test speakers. Confusion matrices are of the validation speakers, in the epoch that "
            "was picked because it did best on them. Rows are the truth, columns the answer: percent of the row above, "
            f'utterances below.</p><div class="matrices">{"".join(matrices)}</div>'
        )
    if not evaluations:
        return _missing(NO_FOLDS + "rates and confusion matrices.")
    parts = [banner]
    for summary in evaluations:
        seeds, models = summary["seeds"], summary["models"]
        if len(evaluations) > 1:
            parts.append(f"<h3>{_text(summary['protocol'])}</h3>")
        else:
            parts.append(f"<p>Protocol: {_text(summary['protocol'])}.</p>")
        parts += [f"<p>{_text(line)}.</p>" for line in (summary["leakage"], *summary["notes"]) if line]
        if summary["missing"]:
            parts.append(_missing(f"Not complete yet, rates are of what is there: {'; '.join(summary['missing'])}."))
        rows = []
        for name, entry in models.items():
            for seed, rates in entry["per_seed"].items():
                of_seed = [rates["utterances"], _rate(rates["wa"]), "", _rate(rates["ua"]), "", ""]
                rows.append([_model(name), f"seed {seed}", *of_seed])
            means = [_rate(entry[rate][what]) for rate in ("wa", "ua") for what in ("mean", "std")]
            rows.append([_model(name), "mean", "", *means, "{:.1f} .. {:.1f}".format(*entry["interval"])])
        parts.append("<h4>Rates, all folds of a seed pooled</h4>")
        parts.append(_table(["model", "", "utterances", "WA\xa0%", "±", "UA\xa0%", "±", "interval"], rows, 2, "mean"))
        drawn = summary["bootstrap"]
        parts.append(
            f"<p>±: sample standard deviation over seeds. Interval: {100 * drawn['level']:.0f} % of the UA, bootstrap "
            f"over {drawn['count']} {drawn['over']}.</p>"
        )
        parts.append(f"<h4>Recall of each class in percent{', seeds added up' if len(seeds) > 1 else ''}</h4>")
        recalls = [[_model(name), *map(_rate, entry["recall"])] for name, entry in models.items()]
        parts.append(_table(["model", *summary["labels"]], recalls, 1))
        parts.append(f"<h4>Confusion matrices{', seeds added up' if len(seeds) > 1 else ''}</h4>")
        parts.append("<p>Rows are the truth, columns the answer: percent of the row above, utterances below.</p>")
        matrices = [_matrix(_model(name), entry["confusion"], summary["labels"]) for name, entry in models.items()]
        parts.append(f'<div class="matrices">{"".join(matrices)}</div>')
    return "".join(parts)


def _matrix(title: str, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{_text(label)}</th>' for label in labels)
    rows = []
    for label, row in zip(labels, counts):
        total = sum(row)
        cells = "".join(
            f'<td style="--a:{0.75 * count / total if total else 0:.3f}">'
            f"{f'{100 * count / total:.0f} %' if total else '–'}<small>{count}</small></td>"
            for count in row
        )
        rows.append(f'<tr><th scope="row">{_text(label)}</th>{cells}</tr>')
    return (
        f'<figure><figcaption>{_text(title)}</figcaption><div class="wide"><table class="matrix"><thead><tr>'
        f"<td>truth ╲ answer</td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def _folds(by_protocol: Mapping[str, Sequence[Fold]]) -> str:
    if not by_protocol:
        return _missing(NO_FOLDS + "rates by fold.")
    parts = []
    for protocol, folds in by_protocol.items():
        models = list(dict.fromkeys(name for fold in folds for name in fold["models"]))
        head = ["seed", "fold", "test", "validation", "speakers shared", "utterances"]
        head += [f"{_model(name)} {rate}\xa0%" for name in models for rate in ("WA", "UA")]
        rows = []
        for fold in folds:
            rates = {name: fold_rates(fold, name) for name in fold["models"]}
            rows.append([
                fold["seed"], fold["name"], fold["test_of"], fold["validation_of"],
                "yes" if fold["shares_speakers"] else "no", len(fold["truth"]),
                *(_rate(rates.get(name, {}).get(rate)) for name in models for rate in ("wa", "ua")),
            ])  # fmt: skip
        if len(by_protocol) > 1:
            parts.append(f"<h3>{_text(protocol)}</h3>")
        parts.append(_table(head, rows, 5))
    return "".join(parts)


def _embeddings(path: Path, labels: Sequence[str]) -> str:
    if not path.exists():
        return _missing("This run has no embeddings.npz, so there are no pictures of the features.")
    needed = [f"{domain}_{what}" for what in ("before", "after", "labels") for domain in ("speech", "face")]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in needed}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected the arrays {', '.join(needed)}, got {error}") from error
    pictures, classes = [], set()
    for when in ("before", "after"):
        parts, kept, total = [], [], 0
        for domain in ("speech", "face"):
            features, truth = arrays[f"{domain}_{when}"], arrays[f"{domain}_labels"]
            if features.ndim != 2 or truth.shape != features.shape[:1] or truth.dtype.kind not in "iu":
                raise ValueError(
                    f"{path}: expected {domain}_{when} (n, d) and n whole {domain}_labels, "
                    f"got {features.shape} and {truth.shape} of {truth.dtype}"
                )
            finite = np.isfinite(features).all(1)
            total += len(features)
            parts.append(features[finite].astype(np.float64))
            kept.append(truth[finite])
        if parts[0].shape[1] != parts[1].shape[1]:
            raise ValueError(f"{path}: expected speech_{when} and face_{when} of one width, got two")
        if not len(parts[0]) + len(parts[1]):
            pictures.append(_missing(f"There are no finite features {when} adaptation."))
            continue
        points, shares = principal_plane(np.concatenate(parts))
        of_domain = (points[: len(parts[0])], points[len(parts[0]) :])
        classes |= {int(k) for truth in kept for k in truth}
        pictures.append(_picture(when, of_domain, kept, shares, total, labels))
    key = [(charts.colour_swatch(k), _label(labels, k)) for k in sorted(classes)]
    key += [(charts.point_swatch(7, False), "speech"), (charts.point_swatch(7, True), "face")]
    return (
        "<p>Principal components of the features of both domains together, a basis of its own for each picture; "
        "colour and name are the class, the shape is the domain.</p>"
        f'<div class="figures">{"".join(pictures)}</div>{charts.key(key)}'
    )


def _label(labels: Sequence[str], k: int) -> str:
    return str(labels[k]) if 0 <= k < len(labels) else f"class {k}"


def _picture(
    when: str,
    points: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    shares: np.ndarray,
    total: int,
    labels: Sequence[str],
) -> str:
    clouds, names, drawn = [], [], 0
    every, both = np.concatenate(truth), np.concatenate(points)
    near = 0.15 * float(np.ptp(both, axis=0).max())
    for k in np.unique(every).tolist():
        middles = [p[t == k].mean(0) for p, t in zip(points, truth) if (t == k).any()]
        if len(middles) == 2 and np.hypot(*(middles[0] - middles[1])) < near:  # one name where the domains meet
            middles = [both[every == k].mean(0)]
        names += [(*middle.tolist(), _label(labels, k)) for middle in middles]
    for triangle, (p, t) in enumerate(zip(points, truth)):
        some = np.linspace(0, len(p) - 1, min(len(p), DRAWN_POINTS)).round().astype(np.int64)
        drawn += len(some)
        clouds += [Cloud(p[some][t[some] == k], k, bool(triangle)) for k in np.unique(t[some]).tolist()]
    title = f"{when.capitalize()} adaptation"
    chart = charts.scatter_chart(
        clouds, names, title=title,
        x_label=f"component 1 ({100 * shares[0]:.1f} % of the variance)",
        y_label=f"component 2 ({100 * shares[1]:.1f} % of the variance)",
    )  # fmt: skip
    caption = f"{len(points[0]):,} points of speech and {len(points[1]):,} of faces"
    caption += f", {drawn:,} of them drawn." if drawn < len(both) else "."
    if total > len(both):
        caption += f" {total - len(both):,} more were not finite."
    return _figure(title, chart, "", caption)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _values(values: Mapping[str, Any] | None, name: str) -> str:
    if not values:
        return _missing(f"This run has no {name} with values.")
    rows = "".join(
        f'<tr><th scope="row">{_text(k)}</th><td>{_text(_shown(v))}</td></tr>' for k, v in flatten(values).items()
    )
    return f'<table class="values"><tbody>{rows}</tbody></table>'


def _head(
    run: Path,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    stages: Mapping[str, Stage],
    evaluations: Sequence[dict[str, Any]],
    banner: str,
) -> tuple[str, str]:
    """The page's title and the part above the sections: name, stage, corpus, banner and main figures."""
    name = str(settings.get("name") or run.resolve().name)
    stage = str(settings.get("stage") or ", ".join(stages))
    known = {**flatten(settings), **flatten(environment)}
    corpus = next((known[k] for k in ("corpus", "corpus.name", "corpus_name") if isinstance(known.get(k), str)), "")
    if "target.corpus" in known:
        corpus += f", tested on {known['target.corpus']}"
    facts = [f"{what} <b>{_text(value)}</b>" for what, value in (("stage", stage), ("corpus", corpus)) if value]
    tiles = []
    for summary in evaluations:
        where = f" ({summary['protocol']})" if len(evaluations) > 1 else ""
        seeds = len(summary["seeds"])
        for model, entry in summary["models"].items():
            ua, wa = entry["ua"], entry["wa"]
            tiles.append((
                _model(model) + where, f"UA {_rate(ua['mean'], ua['std'])} %",
                f"WA {_rate(wa['mean'], wa['std'])} %, {seeds} seed{'s' if seeds > 1 else ''}",
            ))  # fmt: skip
    for which, entry in stages.items():
        if "validation_ua" in entry.epochs and len(entry.epochs["validation_ua"][0]):
            epochs, values, _ = entry.epochs["validation_ua"]
            where = f", {which}" if len(stages) > 1 else ""
            at = f"highest, after epoch {epochs[values.argmax()]:.0f} of {epochs.max():.0f}"
            tiles.append((f"Validation{where}", f"UA {100 * values.max():.1f} %", at))
    count = sum(len(entry.warnings) for entry in stages.values())
    if count:
        tiles.append(("Warnings", f"{count}", "listed with the adversarial training"))
    figures = "".join(
        f"<div><dt>{_text(what)}</dt><dd>{_text(value)}</dd><dd>{_text(more)}</dd></div>" for what, value, more in tiles
    )
    head = f"<h1>{_text(name)}</h1><p>{' · '.join(facts)}</p>{banner}"
    return name, head + (f'<dl class="tiles">{figures}</dl>' if tiles else "")


STYLE = (
    """
:root{--page:#fff;--ink:#1c2126;--soft:#59626b;--line:#e1e4e8;--panel:#f6f7f9;--heat:0,114,178;--warn:#b3261e;"""
    + "".join(f"--c{k}:{colour};" for k, colour in enumerate(charts.LIGHT))
    + """}
@media screen and (prefers-color-scheme:dark){
:root{--page:#14171a;--ink:#e8eaed;--soft:#a3abb4;--line:#31373d;--panel:#1d2125;--heat:20,135,205;--warn:#ff8a80;"""
    + "".join(f"--c{k}:{colour};" for k, colour in enumerate(charts.DARK))
    + """}
}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:70rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;
-webkit-text-size-adjust:100%;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.25;margin:0}
h2{font-size:1.25rem;margin:2.5rem 0 .75rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
h4{font-size:1rem;margin:1.25rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem}
header>p{color:var(--soft)}
header b{color:var(--ink);font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin-top:1rem;font-size:.9rem}
a{color:var(--c0)}
.banner,header>.banner{border:2px solid var(--warn);border-left-width:.6rem;padding:.5rem .8rem;margin:1rem 0;
color:var(--ink);max-width:none}
.banner strong{color:var(--warn)}
.missing{color:var(--soft);font-style:italic}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(12rem,1fr));gap:.7rem;margin:1rem 0}
.tiles div{background:var(--panel);border-radius:.4rem;padding:.6rem .65rem}
.tiles dt{font-size:.85rem;color:var(--soft)}
.tiles dd{margin:0;font-size:.85rem;font-variant-numeric:tabular-nums}
.tiles dt+dd{font-size:1.05rem;font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.6rem 2rem;margin:.8rem 0}
.matrices{display:flex;flex-wrap:wrap;gap:1.2rem 2.5rem}
.matrices figure{max-width:100%}
figure{margin:0;min-width:0;max-width:36rem;break-inside:avoid}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:.2rem}
figure>p{font-size:.85rem;color:var(--soft);margin:.25rem 0 0}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.2rem 0;padding:0;font-size:.85rem}
.key li{display:flex;align-items:center;gap:.35rem}
.key svg{flex:none}
.wide{overflow-x:auto;margin:.4rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem .25rem 0;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;white-space:nowrap;vertical-align:bottom}
td{white-space:nowrap}
td.n,th.n{text-align:right;padding:.25rem 0 .25rem 1rem;white-space:nowrap}
thead th.n{white-space:normal}
tr{break-inside:avoid}
.strong td{font-weight:600}
.matrix th,.matrix td{border:1px solid var(--page);text-align:center;padding:.3rem .4rem;min-width:4.4rem;
font-weight:400}
.matrix thead th{white-space:normal}
.matrix tbody th{text-align:right;color:var(--soft)}
.matrix thead td{font-size:.75rem;color:var(--soft);min-width:0;vertical-align:bottom}
.matrix tr>:first-child{position:sticky;left:0;background:var(--page)}
.matrix tbody td{background:rgba(var(--heat),var(--a));line-height:1.25;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.matrix small{display:block;font-size:.75rem}
.values{width:100%;table-layout:fixed}
.values th{width:45%;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
.values td{overflow-wrap:anywhere;white-space:normal}
.warnings{padding-left:1.1rem;max-width:46rem}
.warnings b{color:var(--warn)}
@media (max-width:40rem){table{font-size:.82rem}th,td{padding-right:.4rem}
td.n,th.n{padding-left:.45rem}.tiles{grid-template-columns:1fr 1fr}
.matrix th,.matrix td{min-width:2.9rem;padding:.3rem .2rem}.matrix thead th{font-size:.75rem}}
@media print{body{max-width:none;padding:0;font-size:11pt}nav{display:none}.wide{overflow:visible}table{font-size:8.5pt}

h2,h3,h4{break-after:avoid}.figures{grid-template-columns:1fr 1fr}}
"""
    + charts.STYLE
)


def _page(head: tuple[str, str], sections: Sequence[tuple[str, str, str]]) -> str:
    title, top = head
    links = "".join(f'<a href="#{name}">{_text(text)}</a>' for name, text, _ in sections)
    body = "\n".join(f'<section id="{name}"><h2>{_text(text)}</h2>{part}</section>' for name, text, part in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>{top}<nav aria-label="Sections">{links}</nav></header>
<main>
{body}
</main>
</body>
</html>
"""
