"""What several task formats share: numbers and LaTeX answers, in one spelling."""

import re

from llmfusion.data.latex import last_boxed as last_boxed

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def as_number(text: str) -> float | str:
    """The value of a number, thousands separated or not; text that is none stays text."""
    cleaned = text.replace(",", "").replace("$", "").strip().rstrip(".")
    try:
        return float(cleaned)
    except ValueError:
        return cleaned


def normalise(answer: str) -> str:
    """LaTeX answers in one spelling (Hendrycks et al., 2021).

    No spaces, units, signs or text wrappers; fractions and roots with braces; 0.5 as 1/2.
    """
    text = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    text = re.split(r"\\text\{ ", text)[0] if "\\text{ " in text else text
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    return {"0.5": "\\frac{1}{2}", "-0.5": "-\\frac{1}{2}"}.get(text, text).rstrip(".")
