"""The same study several times over, for error bars.

Every seed is a replicate with its own noise, mix, order and projectors; replicates share ``--sets`` sets of base models,
which are trained anew for each set (models that are staged are shared by all). The written study has one table,
``seeds``: a row of the first table is the mean over its replicates, with the paired difference to the reference.
"""

import copy
from typing import Any

Data = dict[str, Any]


def replicated(study: Data, seeds: list[int], sets: int) -> Data:
    """The study as plain data with ``trained`` and ``merged`` models once a seed and ``base`` models once a set.

    Raises :class:`ValueError` if there are fewer seeds than sets.
    """
    if not 0 < sets <= min(len(seeds), 8):
        raise ValueError(
            f"{sets} sets of base models for {len(seeds)} seeds; give at least as many seeds as sets, and at most 8 sets"
        )
    if any(isinstance(row["model"], list) for row in next(iter(study["tables"].values()))["rows"]):
        raise ValueError("this study has replicates already: its first table has rows of several models")
    models, table = study["models"], next(iter(study["tables"].values()))
    out = {
        **study,
        "datasets": dict(study["datasets"]),
        "mixes": {},
        "models": {"base": {}, "trained": {}, "merged": {}},
    }
    of_students = {run["mix"] for run in models["trained"].values()}
    for number in range(sets):
        end = f"-{'abcdefgh'[number]}"
        names = {
            f"base/{name}": f"base/{name}{end}" for name, entry in models["base"].items() if entry["kind"] == "scratch"
        }
        for mix in sorted({entry["mix"] for entry in models["base"].values() if "mix" in entry}):
            out["mixes"][f"{mix}{end}"] = _renamed({**study["mixes"][mix], "seed": 42 + number}, names)
        for name, entry in models["base"].items():
            made = _renamed(entry, names) | (
                {"mix": f"{entry['mix']}{end}", "seed": 42 + number} if "mix" in entry else {}
            )
            out["models"]["base"][names.get(f"base/{name}", f"base/{name}").split("/")[1]] = made
        for seed in seeds[number::sets]:
            _add_replicate(study, out, seed, of_students, names)
    out["tables"] = {"seeds": _table(table, seeds)}
    return out


def _add_replicate(study: Data, out: Data, seed: int, mixes: set[str], names: dict[str, str]) -> None:
    models, end = study["models"], f"-s{seed}"
    names = names | {f"{kind}/{name}": f"{kind}/{name}{end}" for kind in ("trained", "merged") for name in models[kind]}
    for name in sorted(mixes):
        mix = study["mixes"][name]
        drawn = [d for d in mix["datasets"] if study["datasets"][d]["kind"] == "generated"]
        out["datasets"] |= {f"{d}{end}": {**study["datasets"][d], "seed": seed} for d in drawn}
        asked = {f"{d}{end}" if d in drawn else d: count for d, count in mix["datasets"].items()}
        out["mixes"][f"{name}{end}"] = _renamed({**mix, "datasets": asked, "seed": seed}, names)
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
    several = [{**row, "model": [f"{row['model']}-s{seed}" for seed in seeds]} for row in rows]
    reference = table.get("reference", "base/")
    kept = {key: value for key, value in table.items() if key != "reference"}
    return {
        **kept,
        **({} if reference.startswith("base/") else {"reference": f"{reference}-s{seeds[0]}"}),
        "rows": several,
    }
