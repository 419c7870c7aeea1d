"""Which of several found genotypes is the best: each is trained briefly, and validated.

The protocol of section 3.1.2 of arXiv:1806.09055: of four searches, the cell with the best
validation accuracy after a short training from scratch is kept. The test set is not read.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from dartsl.config import (
    build,
    command,
    find_validation_fault,
    kept_overrides,
    quote,
    relative,
    resolved,
)
from dartsl.distributed import is_first_process
from dartsl.errors import UserError, unknown
from dartsl.files import CONFIG_FILE, RESULT_FILE, whole_file
from dartsl.genotype import GENOTYPE_FILE, Edge, Genotype, count_skips
from dartsl.search_space import CELL_KINDS, SearchSpace, random_genotype
from dartsl.sweep import load_result, natural
from dartsl.terminal import print_command

TABLE_FILE = "table.csv"
_LIKE_SIZE = 0.1  # of the parameters, by which a random cell's network may differ
_MAX_DRAWS = 10_000
# What the trainings of one selection have in common.
_SETTINGS = ("seed", "data", "network", "module", "trainer.max_epochs", "trainer.max_steps",
             "trainer.limit_train_batches", "trainer.limit_val_batches")  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A genotype that takes part, and where it is trained.

    Attributes:
        name: of the search's folder, or `random_<seed>`.
        genotype: of the candidate.
        num_parameters: of its network, without the auxiliary head.
        folder: of its training.
        is_random: whether it is of the baseline, not of a search.
    """

    name: str
    genotype: Genotype
    num_parameters: int
    folder: Path
    is_random: bool = False


def select(cfg: DictConfig, train: Callable[[DictConfig], float | None]) -> float | None:
    """Train each candidate, and name the best by validation accuracy.

    What is trained stays so: the same command goes on after an interruption, and `only=NAME` trains
    one candidate, so that a sweep over the names trains them side by side.

    Args:
        cfg: that of a training, and `run_dir`, `random_cells` and `only`.
        train: runs the training of a config and returns its validation accuracy.

    Returns:
        The best validation accuracy of those trained.

    Raises:
        UserError: where nothing was found, or a training would be validated on the test set.
    """
    check_numbers(cfg)
    candidates = find_candidates(cfg)
    names = [candidate.name for candidate in candidates]
    chosen = names if cfg.only is None else [str(cfg.only)]
    if not set(chosen) <= set(names):
        raise unknown("candidate", cfg.only, names)
    accuracies = finished_accuracies(cfg, candidates)
    for candidate in candidates:
        if candidate not in accuracies and candidate.name in chosen:
            print(f"\nTraining {candidate.name} ({len(accuracies) + 1} of {len(candidates)})")
            accuracy = train(training_of(cfg, candidate))
            if accuracy is None:
                raise UserError(
                    f"The training of {candidate.name} has ended before it was validated, so "
                    "there is nothing to select by: give it at least one whole epoch."
                )
            accuracies[candidate] = accuracy
    if is_first_process():
        # Other jobs may have trained other candidates meanwhile.
        report(cfg, candidates, accuracies | finished_accuracies(cfg, candidates))
    return max(accuracies.values())


def check_numbers(cfg: DictConfig) -> None:
    """Raise a UserError for a negative random_cells, and where nothing may be selected by."""
    if cfg.random_cells < 0:
        raise UserError(f"random_cells={cfg.random_cells} must be a whole number of at least 0.")
    fault = find_validation_fault(cfg)
    if fault is not None:
        raise UserError(fault)


# ---- candidates ----------------------------------------------------------------------------------


def find_candidates(cfg: DictConfig) -> list[Candidate]:
    """The genotypes below `run_dir`, and `random_cells` random ones of like size and space.

    What a search that has not ended holds is no result, and takes no part.

    Raises:
        UserError: where there is no genotype.
    """
    run_dir = Path(cfg.run_dir)
    searches = sorted(filter(_is_search, run_dir.glob("*")), key=natural)
    searches = searches or list(filter(_is_search, [run_dir]))
    ended = [folder for folder in searches if _has_ended(folder)]
    for folder in searches:
        if folder not in ended:
            print(f"Left out: {relative(folder)}, a search that has not ended")
    if not ended:
        raise UserError(
            f"No genotype in {run_dir}: run_dir is the folder of a sweep of searches, "
            f"run_dir/<job>/{GENOTYPE_FILE}."
        )
    found = [
        _candidate(cfg, folder.resolve().name, Genotype.load(folder / GENOTYPE_FILE))
        for folder in ended
    ]
    if cfg.random_cells:
        found += random_candidates(cfg, found, _search_space(ended[0], found[0].genotype))
    return found


def _is_search(folder: Path) -> bool:
    """Whether a folder holds a search's genotype, not that of a training or of a selection."""
    if not (folder / GENOTYPE_FILE).is_file() or (folder / TABLE_FILE).exists():
        return False
    config = _config(folder)
    return config is None or config.get("task") == "search"


def _has_ended(folder: Path) -> bool:
    return (folder / RESULT_FILE).is_file() or _config(folder) is None


def _search_space(folder: Path, genotype: Genotype) -> SearchSpace:
    """The space that a genotype was found in; that of DARTS where nothing says which."""
    config = _config(folder)
    if config is None or config.get("search_space") is None:
        return SearchSpace(num_intermediate_nodes=len(genotype.normal) // 2)
    return instantiate(config.search_space)


def _config(folder: Path) -> DictConfig | None:
    """That of a folder's run; None where somebody has put a genotype there."""
    path = folder / CONFIG_FILE
    return cast(DictConfig, OmegaConf.load(path)) if path.is_file() else None


def _candidate(
    cfg: DictConfig, name: str, genotype: Genotype, is_random: bool = False
) -> Candidate:
    folder = Path(cfg.output_dir) / name
    return Candidate(name, genotype, _num_parameters(cfg, genotype), folder, is_random)


def _num_parameters(cfg: DictConfig, genotype: Genotype) -> int:
    with torch.device("meta"):  # counted, not made
        network = build(cfg.network)(genotype=genotype, auxiliary=False)
    return sum(parameter.numel() for parameter in network.parameters())


def quick_count(count: Callable[[Genotype], int], space: SearchSpace) -> Callable[[Genotype], int]:
    """Counts as `count` does the parameters of random genotypes' networks, but builds few of them.

    To build one takes a good part of a second, and of thousands drawn few may be as small as those
    found. What an operation has is the difference that it makes in a network where it takes
    another's place; in reduction cells it may depend on whether it reads an input of the cell.
    """
    usual = random_genotype(space, 0)

    def with_last(kind: str, edge: Edge) -> Genotype:
        edges = getattr(usual, kind)
        return replace(usual, **{kind: (*edges[:-2], (edges[-2][0], 0), edge)})

    @cache
    def share(kind: str, primitive: str, reads_input: bool) -> int:
        return count(with_last(kind, (primitive, 1 if reads_input else 2)))

    def shares(genotype: Genotype) -> int:
        return sum(
            share(kind, primitive, source < 2)
            for kind in CELL_KINDS
            for primitive, source in getattr(genotype, kind)
        )

    constant = count(usual) - shares(usual)
    return lambda genotype: constant + shares(genotype)


def random_candidates(
    cfg: DictConfig, found: Sequence[Candidate], space: SearchSpace
) -> list[Candidate]:
    """The first `random_cells` of seeds 0, 1, 2, ... whose networks are as large as those found.

    Raises:
        UserError: where there are not as many.
    """
    sizes = [candidate.num_parameters for candidate in found]
    smallest, largest = min(sizes) * (1 - _LIKE_SIZE), max(sizes) * (1 + _LIKE_SIZE)
    taken = {candidate.name for candidate in found}
    count = quick_count(lambda genotype: _num_parameters(cfg, genotype), space)
    drawn = ((f"random_{seed}", random_genotype(space, seed)) for seed in range(_MAX_DRAWS))
    like = (
        (name, genotype)
        for name, genotype in drawn
        if smallest <= count(genotype) <= largest and name not in taken
    )
    chosen = list(islice(like, cfg.random_cells))
    if len(chosen) < cfg.random_cells:  # known before a network is built for each
        raise UserError(
            f"Of {_MAX_DRAWS:,} random cells only {len(chosen)} have between {smallest:,.0f} and "
            f"{largest:,.0f} parameters: lower random_cells={cfg.random_cells}."
        )
    return [_candidate(cfg, name, genotype, is_random=True) for name, genotype in chosen]


# ---- trainings -----------------------------------------------------------------------------------


def training_of(cfg: DictConfig, candidate: Candidate) -> DictConfig:
    """The config of a candidate's training, which goes on where one was interrupted."""
    path = candidate.folder / GENOTYPE_FILE
    if is_first_process():
        candidate.genotype.save(path)
    training = cfg.copy()
    with open_dict(training):
        training.task = "train"
        training.output_dir = str(candidate.folder)
        training.genotype = {"_target_": "dartsl.genotype.Genotype.load", "path": str(path)}
        training.resume = "auto"
        training.print_config = False
        for logger in (training.get("logger") or {}).values():
            if "job_type" in logger:  # of Weights & Biases
                logger.job_type = "select"
    return training


def finished_accuracies(cfg: DictConfig, candidates: Iterable[Candidate]) -> dict[Candidate, float]:
    """The validation accuracies of the candidates whose training has ended."""
    found = {candidate: finished_accuracy(cfg, candidate) for candidate in candidates}
    return {candidate: value for candidate, value in found.items() if value is not None}


def finished_accuracy(cfg: DictConfig, candidate: Candidate) -> float | None:
    """The validation accuracy of a training that has ended; None where it has not.

    Raises:
        UserError: where the folder holds a training with other settings.
    """
    path = candidate.folder / CONFIG_FILE
    if not path.is_file():
        return None
    before, now = OmegaConf.load(path), resolved(cfg)
    for key in _SETTINGS:
        if OmegaConf.select(before, key) != OmegaConf.select(now, key):
            raise UserError(
                f"{candidate.folder} holds a training with another {key}: choose another folder "
                "by output_dir=FOLDER, or remove this one."
            )
    if Genotype.load(candidate.folder / GENOTYPE_FILE) != candidate.genotype:
        raise UserError(
            f"{candidate.folder} holds the training of another genotype: choose another folder by "
            "output_dir=FOLDER, or remove this one."
        )
    result = load_result(candidate.folder)
    return None if result is None else result.get("val_accuracy")


# ---- report --------------------------------------------------------------------------------------


def report(
    cfg: DictConfig, candidates: Sequence[Candidate], accuracies: Mapping[Candidate, float]
) -> None:
    """Print and write the table, the best genotype that was found, and the next command."""
    folder = Path(cfg.output_dir)
    ranking = sorted(accuracies, key=lambda c: (-accuracies[c], c.is_random, c.num_parameters))
    rows = [table_row(place + 1, c, accuracies[c]) for place, c in enumerate(ranking)]
    write_csv(folder / TABLE_FILE, rows)
    table = markdown(rows)
    with whole_file(folder / "table.md") as part:
        part.write_text(table, encoding="utf-8")
    print(f"\n{table}")
    waiting = [candidate.name for candidate in candidates if candidate not in accuracies]
    if waiting:
        print(f"Not trained yet: {', '.join(waiting)}")
        return
    best = next(candidate for candidate in ranking if not candidate.is_random)
    best.genotype.save(folder / GENOTYPE_FILE)
    if accuracies[ranking[0]] > accuracies[best]:
        print("A random cell did better than every cell found.")
    print(f"Genotype: {relative(folder / GENOTYPE_FILE)} (that of {best.name})")
    print_command(_next_command(cfg, folder / GENOTYPE_FILE))


def table_row(place: int, candidate: Candidate, accuracy: float) -> dict[str, Any]:
    """A line of the table."""
    return {
        "place": place,
        "genotype": candidate.name,
        "validation accuracy (%)": f"{100 * accuracy:.2f}",
        "parameters": candidate.num_parameters,
        "skip connections (normal)": count_skips(candidate.genotype.normal),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write lines of a table, each with the same columns."""
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of a table, each with the same columns, as Markdown."""
    lines: list[Iterable[Any]] = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _next_command(cfg: DictConfig, genotype: Path) -> str:
    return command(
        "-m",
        f"experiment={cfg.next_experiment}",
        *kept_overrides(),
        "genotype=from_file",
        f"genotype.path={quote(relative(genotype))}",
        "seed=0,1,2",
    )
