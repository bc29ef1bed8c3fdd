"""The same study several times over, for error bars.

Every seed is a replicate with its own noise, mix, order and projectors; replicates share ``--sets`` sets of base
models, which are trained anew for each set (models that are staged are shared by all). The written study has one
table, ``seeds``: a row of the first table is the mean over its replicates, with the paired difference to the
reference.
"""

import copy
from typing import Any

from llmfusion.study.schema.study import BuiltinSections

Data = dict[str, Any]


def replicated(study: Data, seeds: list[int], sets: int) -> Data:
    """The study as plain data with ``trained`` and ``merged`` models once a seed and ``base`` models once a set.

    Raises :class:`ValueError` if there are fewer seeds than sets, or a section that cannot be replicated.
    """
    if not 0 < sets <= min(len(seeds), 8):
        limits = "give at least as many seeds as sets, and at most 8 sets"
        raise ValueError(f"{sets} sets of base models for {len(seeds)} seeds; {limits}")
    table = next(iter(study["tables"].values()))
    if any(isinstance(row["model"], list) for row in table["rows"]):
        raise ValueError("this study has replicates already: its first table has rows of several models")
    added = sorted(key for key in study if key not in BuiltinSections.model_fields)
    if added:
        raise ValueError(f"sections that kinds of artifacts add cannot be replicated: {', '.join(added)}; remove them")
    out = {
        **study,
        "datasets": dict(study["datasets"]),
        "mixes": {},
        "models": {"base": {}, "trained": {}, "merged": {}},
    }
    for number in range(sets):
        names = _add_set(study, out, number)
        for seed in seeds[number::sets]:
            _add_replicate(study, out, seed, names)
    out["tables"] = {"seeds": _table(table, seeds)}
    return out


def _add_set(study: Data, out: Data, number: int) -> dict[str, str]:
    """Add one set of base models with their mixes. Returns the new address of each model that is trained anew."""
    models = study["models"]["base"]
    end = f"-{'abcdefgh'[number]}"
    seed = 42 + number
    names = {f"base/{name}": f"base/{name}{end}" for name, entry in models.items() if entry["kind"] == "scratch"}
    for mix in sorted({entry["mix"] for entry in models.values() if "mix" in entry}):
        out["mixes"][f"{mix}{end}"] = _renamed({**study["mixes"][mix], "seed": seed}, names)
    for name, entry in models.items():
        changes = {"mix": f"{entry['mix']}{end}", "seed": seed} if "mix" in entry else {}
        address = names.get(f"base/{name}", f"base/{name}")
        out["models"]["base"][address.split("/")[1]] = _renamed(entry, names) | changes
    return names


def _add_replicate(study: Data, out: Data, seed: int, names: dict[str, str]) -> None:
    """Add the trained and merged models of one seed, with their mixes and generated datasets."""
    models = study["models"]
    end = f"-s{seed}"
    names = names | {f"{kind}/{name}": f"{kind}/{name}{end}" for kind in ("trained", "merged") for name in models[kind]}
    for name in sorted({run["mix"] for run in models["trained"].values()}):
        mix = study["mixes"][name]
        generated = [dataset for dataset in mix["datasets"] if study["datasets"][dataset]["kind"] == "generated"]
        out["datasets"] |= {f"{dataset}{end}": {**study["datasets"][dataset], "seed": seed} for dataset in generated}
        counts = {f"{key}{end}" if key in generated else key: count for key, count in mix["datasets"].items()}
        out["mixes"][f"{name}{end}"] = _renamed({**mix, "datasets": counts, "seed": seed}, names)
    for name, run in models["trained"].items():
        out["models"]["trained"][f"{name}{end}"] = _renamed({**run, "mix": f"{run['mix']}{end}", "seed": seed}, names)
    for name, merge in models["merged"].items():
        out["models"]["merged"][f"{name}{end}"] = _renamed(merge, names)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """A copy in which every address that has a new name has it."""
    if isinstance(value, dict):
        return {key: _renamed(v, names) for key, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else copy.copy(value)


def _table(table: Data, seeds: list[int]) -> Data:
    rows = [row for row in table["rows"] if not row["model"].startswith("base/")]
    replicates = [{**row, "model": [f"{row['model']}-s{seed}" for seed in seeds]} for row in rows]
    out = {key: value for key, value in table.items() if key != "reference"}
    if (reference := table.get("reference")) is not None and not reference.startswith("base/"):
        out["reference"] = f"{reference}-s{seeds[0]}"
    return {**out, "rows": replicates}
