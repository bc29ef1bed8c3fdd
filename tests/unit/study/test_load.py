"""One mistake at a time put into the miniature study: refused with key, value, what is allowed and the nearest name."""

import json
import random
from pathlib import Path

import pytest

from llmfusion.study.errors import StudyError
from llmfusion.study.load import read_study
from llmfusion.study.snakemake import checked
from tests.mutations import as_yaml, mutate
from tests.unit.mini_study import MINI, refusal, small, write

TEXT = MINI.read_text()
KD = "teachers: [base/code], fusion: {target: kd}"
MERGE = "{pivot: base/pivot, parents: [trained/kd-code, trained/kd-math], method: ta}"
SFT, KD_CODE, TA = "models.trained.sft", "models.trained.kd-code", "models.merged.ta-homogeneous"
HUB = "    hub: {{kind: hub, repo: a/b, revision: {}, vocabulary: x, license: mit}}\n    code: {{<<"

MISTAKES: list[tuple[str, str, str, str, list[str]]] = [  # name, replace, by, key that is named, what else is said
    ("unknown key", "  steps: 400\n", "  stepz: 400\n", f"{SFT}.stepz", ["unknown key", "did you mean 'steps'?"]),
    ("unknown top key", "capture:", "captur:", "captur", ["did you mean 'capture'?"]),
    (
        "unknown fusion key",
        "{target: kd}",
        "{target: kd, lamda: 0.5}",
        f"{KD_CODE}.fusion.lamda",
        ["did you mean 'lambda'?"],
    ),
    ("key of another method", MERGE, MERGE.replace("ta}", "ta, tau: 0.1}"), f"{TA}.tau", ["unknown key", "lambda"]),
    ("missing key", "scale: miniature\n", "", "scale", ["is missing"]),
    (
        "unknown dataset",
        "noisy-code: 450",
        "noisy-cod: 450",
        "mixes.student.datasets.noisy-cod",
        ["no dataset 'noisy-cod'", "did you mean 'noisy-code'?"],
    ),
    (
        "unknown mix",
        "  mix: student\n",
        "  mix: studnet\n",
        f"{SFT}.mix",
        ["no mix 'studnet'", "did you mean 'student'?"],
    ),
    (
        "unknown task of a mix",
        "against: [mmlu,",
        "against: [mmlo,",
        "mixes.student.against[0]",
        ["no task 'mmlo'", "did you mean 'mmlu'?"],
    ),
    (
        "unknown task of a table",
        "tasks: [mmlu, gsm8k,",
        "tasks: [mmlu, gsm9k,",
        "tables.table2.tasks[1]",
        ["no task 'gsm9k'", "did you mean 'gsm8k'?"],
    ),
    (
        "unknown task of a batch",
        "  all: [mmlu,",
        "  all: [mmmu,",
        "batches.all[0]",
        ["no task 'mmmu'", "did you mean 'mmlu'?"],
    ),
    (
        "k without topk",
        "capture: {dtype: float32,",
        "capture: {k: 5, dtype: float32,",
        "capture",
        ["k has no meaning with kind hidden", "belongs to kind topk"],
    ),
    (
        "unknown kind of cache",
        "capture: {dtype: float32,",
        "capture: {kind: logits, dtype: float32,",
        "capture.kind",
        ["got 'logits'", "'hidden', 'topk' or 'online'"],
    ),
    (
        "unknown teacher",
        KD,
        KD.replace("code]", "cod]"),
        f"{KD_CODE}.teachers[0]",
        ["no model 'base/cod'", "did you mean 'base/code'?"],
    ),
    (
        "unknown parent",
        MERGE,
        MERGE.replace("kd-math", "kd-mat"),
        f"{TA}.parents[1]",
        ["no model 'trained/kd-mat'", "did you mean 'trained/kd-math'?"],
    ),
    (
        "unknown pivot",
        MERGE,
        MERGE.replace("base/pivot", "base/pivit"),
        f"{TA}.pivot",
        ["no model 'base/pivit'", "did you mean 'base/pivot'?"],
    ),
    (
        "unknown model of a row",
        "{model: base/code,",
        "{model: base/coda,",
        "tables.table2.rows[1].model",
        ["did you mean 'base/code'?"],
    ),
    (
        "unknown tokenizer",
        "tokenizers: [base/pivot,",
        "tokenizers: [base/pivt,",
        "mixes.student.tokenizers[0]",
        ["did you mean 'base/pivot'?"],
    ),
    ("no address", "  init: base/pivot\n", "  init: pivot\n", f"{SFT}.init", ["got 'pivot'", "base/NAME"]),
    (
        "unknown target",
        "{target: kd}",
        "{target: kdd}",
        f"{KD_CODE}.fusion.target",
        ["got 'kdd'", "did you mean 'kd'?"],
    ),
    ("unknown method", MERGE, MERGE.replace("ta}", "tise}"), f"{TA}.method", ["got 'tise'", "did you mean 'ties'?"]),
    (
        "unknown generator",
        "generator: animals, form: text",
        "generator: animal, form: text",
        "datasets.text-facts.generator",
        ["'sums'", "did you mean 'animals'?"],
    ),
    (
        "unknown format",
        "format: letter",
        "format: leter",
        "tasks.mmlu.format",
        ["allowed: ", "'letter'", "'number'", "did you mean 'letter'?"],
    ),
    ("word for number", "  steps: 400\n", "  steps: '400'\n", f"{SFT}.steps", ["got '400' (str)", "integer"]),
    ("share for number", "  steps: 400\n", "  steps: 400.5\n", f"{SFT}.steps", ["got 400.5 (float)", "integer"]),
    ("true for number", "max_length: 128", "max_length: true", "mixes.raw.max_length", ["got True (bool)"]),
    ("list for name", "  mix: student\n", "  mix: [student]\n", f"{SFT}.mix", ["got ['student'] (list)"]),
    (
        "name for list",
        KD,
        KD.replace("[base/code]", "base/code"),
        f"{KD_CODE}.teachers",
        ["got 'base/code' (str)", "list"],
    ),
    ("quoted 1e-6", "  lr: 4e-3\n", '  lr: "1e-6"\n', f"{SFT}.lr", ["got '1e-6' (str)", "number"]),
    (
        "yes is a word",
        "tie_word_embeddings: true",
        "tie_word_embeddings: yes",
        "models.base.pivot.architecture.tie_word_embeddings",
        ["got 'yes' (str)", "boolean"],
    ),
    (
        "no is a word",
        "scale: miniature",
        "scale: no",
        "scale",
        ["got 'no' (str)", "allowed: 'paper', 'small' or 'miniature'"],
    ),
    (
        "on is a word",
        "tie_word_embeddings: true",
        "tie_word_embeddings: on",
        "models.base.pivot.architecture.tie_word_embeddings",
        ["got 'on' (str)"],
    ),
    ("lr 0", "  lr: 4e-3\n", "  lr: 0\n", f"{SFT}.lr", ["got 0", "greater than 0"]),
    ("lr 1", "  lr: 4e-3\n", "  lr: 1.0\n", f"{SFT}.lr", ["got 1.0", "less than 1"]),
    ("lr nan", "  lr: 4e-3\n", "  lr: .nan\n", f"{SFT}.lr", ["got nan"]),
    ("lr_min above lr", "  lr_min: 2e-4\n", "  lr_min: 0.5\n", SFT, ["lr_min 0.5 is above lr 0.004"]),
    ("batch 0", "  batch_size: 16\n", "  batch_size: 0\n", f"{SFT}.batch_size", ["got 0 (int)", "greater than 0"]),
    (
        "lambda above 1",
        "{target: kd}",
        "{target: kd, lambda: 1.01}",
        f"{KD_CODE}.fusion.lambda",
        ["got 1.01", "less than or equal to 1"],
    ),
    (
        "lambda below 0",
        "{target: kd}",
        "{target: kd, lambda: -0.1}",
        f"{KD_CODE}.fusion.lambda",
        ["got -0.1", "greater than or equal to 0"],
    ),
    (
        "temperature 0",
        "{target: kd}",
        "{target: kd, temperature: 0}",
        f"{KD_CODE}.fusion.temperature",
        ["got 0", "greater than 0"],
    ),
    ("tau 0", MERGE, MERGE.replace("ta}", "rsaf, tau: 0}"), f"{TA}.tau", ["got 0", "greater than 0"]),
    ("tau above 1", MERGE, MERGE.replace("ta}", "sce, tau: 1.5}"), f"{TA}.tau", ["got 1.5", "less than or equal to 1"]),
    ("density above 1", MERGE, MERGE.replace("ta}", "ties, density: 2}"), f"{TA}.density", ["got 2"]),
    ("epochs and steps", "  steps: 400\n", "  steps: 400\n  epochs: 1\n", SFT, ["exactly one of epochs and steps"]),
    (
        "wrong shares",
        "wrong: 0.35, domain: code",
        "wrong: 1.35, domain: code",
        "datasets.noisy-code.wrong",
        ["got 1.35"],
    ),
    (
        "more than there is",
        "noisy-code: 450",
        "noisy-code: 45000",
        "mixes.student.datasets.noisy-code",
        ["45000 samples", "480 rows"],
    ),
    ("no sources", KD, "teachers: [], fusion: {target: kd}", KD_CODE, ["teachers and fusion go together"]),
    ("no fusion", KD, "teachers: [base/code]", KD_CODE, ["teachers and fusion go together"]),
    (
        "one source for many",
        KD,
        "teachers: [base/code], fusion: {target: udf}",
        f"{KD_CODE}.teachers",
        ["udf needs two teachers or more, one is given"],
    ),
    (
        "two sources for one",
        KD,
        "teachers: [base/code, base/math], fusion: {target: kd}",
        f"{KD_CODE}.fusion.target",
        ["kd has one teacher, 2 are given"],
    ),
    (
        "source twice",
        KD,
        "teachers: [base/code, base/code], fusion: {target: udf}",
        f"{KD_CODE}.teachers[1]",
        ["'base/code' stands here twice"],
    ),
    (
        "SeqKD source twice",
        "generated: [base/code]",
        "generated: [base/code, base/code]",
        "models.trained.seqkd-code.generated[1]",
        ["twice"],
    ),
    (
        "pivot among sources",
        KD,
        KD.replace("code]", "pivot]"),
        f"{KD_CODE}.teachers[0]",
        ["'base/pivot' is the model this one starts from"],
    ),
    (
        "no parents",
        MERGE,
        MERGE.replace("trained/kd-code, trained/kd-math", ""),
        f"{TA}.parents",
        ["got []", "at least 1 item"],
    ),
    (
        "parent twice",
        MERGE,
        MERGE.replace("kd-math", "kd-code"),
        f"{TA}.parents[1]",
        ["'trained/kd-code' stands here twice"],
    ),
    (
        "pivot a parent",
        MERGE,
        MERGE.replace("trained/kd-math", "base/pivot"),
        f"{TA}.parents[1]",
        ["'base/pivot' is the merge's pivot"],
    ),
    (
        "another pivot",
        MERGE,
        MERGE.replace("base/pivot", "base/code"),
        f"{TA}.parents[0]",
        ["starts from 'base/pivot'", "pivot is 'base/code'"],
    ),
    (
        "weights miscounted",
        MERGE,
        MERGE.replace("ta}", "ta, weight: [1.0]}"),
        f"{TA}.weight",
        ["1 values for 2 parents"],
    ),
    (
        "parents in bfloat16",
        "  save_dtype: float32\n\ncapture",
        "  save_dtype: bfloat16\n\ncapture",
        f"{TA}.parents[0]",
        ["saved in bfloat16", "save_dtype: float32"],
    ),
    (
        "itself a parent",
        MERGE,
        MERGE.replace("trained/kd-math", "merged/ta-homogeneous"),
        TA,
        ["needs itself: merged/ta-homogeneous <- merged/ta-homogeneous"],
    ),
    (
        "cycle",
        "math: {<<: *base, init: base/pivot",
        "math: {<<: *base, init: trained/kd-math",
        "models.base.math",
        ["base/math <- trained/kd-math <- base/math"],
    ),
    (
        "cycle through a mix",
        "  raw: # what the pivot reads: texts, never questions\n",
        "  raw:\n    tokenizers: [base/code]\n",
        "models.base.code",
        ["needs itself"],
    ),
    ("task in no batch", "  all: [mmlu, ", "  all: [", "tasks.mmlu", ["is in no batch"]),
    (
        "task in two batches",
        "\nmodels:\n",
        "\n  two: [math]\n\nmodels:\n",
        "batches.two[0]",
        ["'math' is already in batch 'all'"],
    ),
    ("task twice in a batch", "  all: [mmlu, ", "  all: [mmlu, mmlu, ", "batches.all[1]", ["'mmlu' stands here twice"]),
    (
        "a row twice",
        "{model: base/code,",
        "{model: base/pivot,",
        "tables.table2.rows[1].model",
        ["'base/pivot' has a row already"],
    ),
    ("a branch", "    code: {<<", HUB.format("main"), "models.base.hub.revision", ["got 'main'", "40 hex digits"]),
    (
        "a short commit",
        "    code: {<<",
        HUB.format("'0123abc'"),
        "models.base.hub.revision",
        ["got '0123abc'", "40 hex digits"],
    ),
    ("an upper-case commit", "    code: {<<", HUB.format("A" * 40), "models.base.hub.revision", ["40 hex digits"]),
    (
        "test items that train",
        "form: text, rows: 3000",
        "form: test, rows: 3000",
        "datasets.text-facts.form",
        ["cannot be trained on"],
    ),
    (
        "chat as a task",
        "form: test, rows: 300",
        "form: chat, rows: 300",
        "tasks.mmlu.items.form",
        ["got 'chat'", "form: test"],
    ),
    (
        "shots from nowhere",
        "    format: letter\n",
        "    format: letter\n    shots: 5\n",
        "tasks.mmlu.shots_from",
        ["5 shots must come from somewhere"],
    ),
    (
        "heads that do not divide",
        "num_attention_heads: 4",
        "num_attention_heads: 5",
        "models.base.pivot.architecture",
        ["64 is no multiple of num_attention_heads 5"],
    ),
    ("a bad name", "    kd-code:", "    KD code:", "models.trained.KD code", ["a name is made of lower-case letters"]),
    (
        "a pair without columns",
        "datasets:\n  text-facts:",
        "datasets:\n  own: {kind: path, path: a.jsonl, layout: pair, domain: x, license: mit}\n  text-facts:",
        "datasets.own.columns",
        ["is needed with layout pair"],
    ),
    (
        "test layout as data",
        "datasets:\n  text-facts:",
        "datasets:\n  own: {kind: path, path: a.jsonl, layout: mmlu, domain: x, license: mit}\n  text-facts:",
        "datasets.own.layout",
        ["got 'mmlu'", "allowed here: ", "pair", "messages"],
    ),
]


@pytest.mark.parametrize(("old", "new", "key", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told_with_its_key_and_line(tmp_path: Path, old: str, new: str, key: str, said: list[str]) -> None:
    assert old in TEXT, "the miniature study no longer has what this case changes"
    told = [line for line in refusal(tmp_path, TEXT.replace(old, new, 1)).splitlines() if f": {key}: " in line]
    assert told, f"{key} is not named"
    assert all(any(word in line for line in told) for word in said), told
    assert all(int(line.split("study.yaml:")[1].split(":")[0]) > 1 for line in told if "is missing" not in line)


def test_the_line_of_a_mistake_is_the_line_in_the_file(tmp_path: Path) -> None:
    number = 1 + TEXT[: TEXT.index("format: letter")].count("\n")
    assert f"study.yaml:{number}: tasks.mmlu.format: " in refusal(
        tmp_path, TEXT.replace("format: letter", "format: leter", 1)
    )


def test_1e_6_is_a_number(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, TEXT.replace("  lr: 4e-3\n  lr_min: 2e-4\n", "  lr: 1e-6\n", 1)))
    assert study.models.trained["sft"].lr == 1e-6


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    told = refusal(tmp_path, TEXT.replace("    sft: *student\n", "    sft: *student\n    sft: *student\n", 1))
    assert "key 'sft' again" in told


def test_mistakes_of_every_sort_are_told_together(tmp_path: Path) -> None:
    text = TEXT.replace("format: letter", "format: leter", 1).replace("noisy-code: 450", "noisy-cod: 450", 1)
    text = text.replace("{target: kd}", "{target: kd, temperature: 0}", 1).replace(
        MERGE, MERGE.replace("kd-math", "nobody"), 1
    )
    told = refusal(tmp_path, text)
    assert told.splitlines()[0].endswith("4 mistakes; nothing was started")
    for key in (
        "tasks.mmlu.format",
        "mixes.student.datasets.noisy-cod",
        "models.trained.kd-code.fusion.temperature",
        f"{TA}.parents[1]",
    ):
        assert f": {key}: " in told


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "a study is a mapping"), ("- a\n", "this is list"), ("just words", "this is str"), ("a: [", "1 mistake")],
)
def test_what_is_no_study_says_so(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_missing_file_and_a_folder_are_refused_in_words(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "absent.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(StudyError, match=said):
            read_study(path)


def test_keys_that_begin_with_x_hold_anchors_and_nothing_else(tmp_path: Path) -> None:
    assert read_study(write(tmp_path, TEXT + "\nx-anything: {a: [1, {b: c}]}\n")) == read_study(MINI)


def test_no_mutation_of_a_study_ends_in_anything_but_acceptance_or_a_refusal(tmp_path: Path) -> None:
    """150 random mutations; unquoted keys make ints, nulls and booleans of some."""
    outcomes = {"accepted": 0, "refused": 0}
    for seed in range(150):
        draw, data = random.Random(seed), small()
        for _ in range(draw.randint(1, 3)):
            mutate(data, draw)
        text = as_yaml(data)
        try:
            checked(write(tmp_path, text))
            outcomes["accepted"] += 1
        except StudyError as error:
            assert "nothing was started" in str(error)  # noqa: PT017 - both outcomes are allowed
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["accepted"] > 3


def test_a_format_needs_fields_that_the_layout_gives(tmp_path: Path) -> None:
    items = {"kind": "path", "path": "mine.jsonl", "layout": "gsm8k", "license": "mine"}
    data = small()
    data["tasks"]["mmlu"]["items"] = items
    message = refusal(tmp_path, json.dumps(data))
    assert "tasks.mmlu.format: letter needs the fields choices; items of layout gsm8k have: question, answer" in message
