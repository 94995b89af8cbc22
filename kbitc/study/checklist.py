"""The checklist of *(Mis)Fitting* (2502.18969), answered from what was run.

The one thing to know: an answer is made of the table and the fits. What neither holds, how the models were
trained above all, is said to be unknown here, and not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping

from kbitc.study.curves import COUNTS, DRAWS, Family, Series
from kbitc.study.fits import DRAWS as FIT_DRAWS
from kbitc.study.fits import LEVEL, Fitted, NoFit
from kbitc.study.laws import JOINT, POWER

UNKNOWN = "not in the table: it is known to who trained the models"
Answers = Mapping[str, str]


def checklist(
    family: Family, reference: Series, powers: Mapping[int, Fitted | NoFit], joint: Fitted | NoFit
) -> dict[str, Answers]:
    """Answers by part and question."""
    return {
        "Scaling-law hypothesis": _hypothesis(family, powers, joint),
        "Training setup": _training(family),
        "Data collection": _data(family, reference),
        "Fitting": _fitting(powers, joint),
    }


def _hypothesis(family: Family, powers: Mapping[int, Fitted | NoFit], joint: Fitted | NoFit) -> Answers:
    done = [fitted for fitted in powers.values() if isinstance(fitted, Fitted)]
    bits = [family.bits(row) for row in family.rows]
    return {
        "What form?": f"per precision {POWER.equation}; joint {JOINT.equation}; and without a form: straight "
        "lines between models over log2(bits), as the k-bit paper",
        "What are the variables and their units?": f"x: {COUNTS[family.count]}; N: parameters, tied ones "
        "once, embeddings included; k: bits of a code; L: nats per token",
        "How many parameters, against how many points?": "; ".join(
            [f"{len(POWER.parameters)} against {fitted.points}" for fitted in done[:1]]
            + ([f"{len(JOINT.parameters)} against {joint.points}" if isinstance(joint, Fitted) else ""])
        )
        or "no fit",
        "Why this form?": "a floor and a power of size are what language models follow (2203.15556); an "
        "exponential in the bits of a code is what rounding errors of uniform steps follow (6 dB a bit)",
        "Over what range is it valid?": f"{min(bits):.3g} to {max(bits):.3g} bits, which were measured; no "
        "best precision is told outside of what two precisions cover",
        "Is the whole curve fitted, or its optimum?": "the whole curve",
    }


def _training(family: Family) -> Answers:
    sizes = sorted({row.parameters for row in family.rows})
    return {
        "How many models, and which sizes?": f"{len(sizes)}: {', '.join(f'{size:,}' for size in sizes)}",
        "On what data, how much, repeated?": UNKNOWN,
        "Which tokenizer?": "one: all models cut the scored text into the same tokens",
        "How are parameters counted?": "all, embeddings included, tied ones once; and the quantized ones "
        "alone in the paper's count of bits",
        "How is compute counted?": "it is not: nothing here is against compute",
        "Which hyper-parameters, and how chosen at each size?": UNKNOWN,
        "Which schedule of the learning rate?": UNKNOWN,
        "Are code and checkpoints open?": "the code of this study is: kbitc; examples/train_family.py trains "
        "a family and states its settings in each folder's training.json",
    }


def _data(family: Family, reference: Series) -> Answers:
    first = family.rows[0]
    dropped = ", ".join(f"{row.model} at {row.format}" for row in family.left_out) or "none"
    return {
        "How many points?": f"{len(family.rows)} jobs of {len(family.models)} models; the fits are of "
        f"{reference}",
        "Are intermediate checkpoints points?": "no: one point a model and format",
        "Which metric, on what?": f"mean negative log-likelihood of {first.tokens:,} tokens of {first.text} "
        f"(SHA-256 {first.text_sha256[:12]}), windows of {first.context}, its standard error over windows",
        "Is anything smoothed, averaged or interpolated?": "losses are not; comparisons at equal bits "
        "interpolate linearly over log2(bits)",
        "Which points were left out?": f"those whose loss is not finite: {dropped}; no other, and none is "
        "clipped",
        "Are points independent?": "no: one model gives a point at each precision; so whole models are "
        "resampled, and windows in pairs",
    }


def _fitting(powers: Mapping[int, Fitted | NoFit], joint: Fitted | NoFit) -> Answers:
    every = [*powers.values(), joint]
    done = [fitted for fitted in every if isinstance(fitted, Fitted)]
    if not done:
        reasons = dict.fromkeys(fitted.reason for fitted in every if isinstance(fitted, NoFit))
        return {"What was fitted?": f"nothing: {'; '.join(reasons)}"}
    held = [fitted.held_out for fitted in done if fitted.held_out is not None]
    return {
        "Which objective?": "Huber's loss of log L, its corner at 1.345 robust standard deviations (1e-3 in "
        "the search for the start)",
        "Which optimizer?": "scipy.optimize.least_squares, a trust region",
        "From which starts, and how many reached the best?": "; ".join(
            f"{fitted.reached} of {fitted.starts}" for fitted in done
        ),
        "How good is the fit?": "; ".join(
            f"R² {fitted.explained:.4f}, residuals {100 * fitted.spread:.2g} %" for fitted in done
        ),
        "Which intervals?": f"{100 * LEVEL:.0f} %: Student's of the Gauss-Newton covariance; beside them of "
        f"{FIT_DRAWS} resamples of whole models; of comparisons, {DRAWS} resamples of windows",
        "Does it extrapolate?": f"the largest model, predicted from the others: off by at most "
        f"{100 * max(own.error for own in held):.2g} %, {sum(own.is_within for own in held)} of {len(held)} "
        "within the prediction interval"
        if held
        else "too few models to leave the largest out",
        "Are the data of another law?": "; ".join(dict.fromkeys(f.warning for f in done if f.warning))
        or "not that these tests notice",
    }
