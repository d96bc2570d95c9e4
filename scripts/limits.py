"""Measures recall and errors of the maps against the significance of the substructure."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.errors import check
from gravlens_jax.files import write_atomically
from gravlens_jax.metrics import NO_DEFLECTION, VISIBLE, convergence

if TYPE_CHECKING:
    from gravlens_jax.network import Network
    from gravlens_jax.npz import Dataset

SIGMAS = (0, 8, 12, 18, 27, 40, 60, 90, 1e6)  # edges of bins of the significance
LIGHTS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1)  # of the mean pixel in a cell
LENGTHS = (0, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 1)  # of a predicted deflection, arcsec
BLOCK = 50  # lenses whose significance is computed together


def find_significances(dataset: "Dataset", priors: Any) -> np.ndarray:
    """Returns `lensing.significance` of simulated lenses, float32 (n,); 0 for those without substructure."""
    import jax

    from gravlens_jax.lensing import significance
    from gravlens_jax.lensing.images import in_blocks

    assert dataset.lens_params is not None
    found = np.zeros(dataset.size, np.float32)
    compute = jax.jit(partial(jax.lax.map, partial(significance, priors=priors)))
    for label in np.unique(dataset.labels):
        rows = np.flatnonzero(dataset.labels == label)
        lenses = {name: x[rows] for name, x in dataset.lens_params.items() if not np.isnan(x[rows]).all()}
        if any(name in lenses for name in ("subhalo_masses", "vortex_mass")):
            sigmas = [np.asarray(compute(block)) for block in in_blocks(lenses, min(BLOCK, len(rows)))]
            found[rows] = np.concatenate(sigmas)[: len(rows)]
    return found


def bin_means(x: np.ndarray, values: np.ndarray, edges: tuple[float, ...]) -> list[dict[str, float]]:
    """Returns for each bin of `x` that has values: low, high, n, the mean of `values` and its standard error."""
    bins = []
    for low, high in pairwise(edges):
        inside = values[(x >= low) & (x < high)].astype(np.float64)
        if len(inside):
            error = inside.std() / np.sqrt(len(inside))
            bins.append({"low": low, "high": high, "n": len(inside), "mean": inside.mean(), "error": error})
    return bins


def measure(network: "Network", dataset: "Dataset") -> dict[str, Any]:
    """Returns the numbers that `draw` shows, ready for JSON.

    Args:
      network: one that predicts deflections.
      dataset: simulated images with lens parameters.

    Returns:
      recall and map_error, class -> bins of the significance, see `bin_means`: fraction of right predictions, and root
      mean square error of the map in cells with light over that of no map at all; cell_error, bins of the light in the
      cell: error of a component in milliarcseconds; slope, bins of the predicted length: of the true deflection along
      the predicted one; no_peak, the 99.9 % quantile of the largest convergence of images without substructure.
    """
    from gravlens_jax.datasets import find_priors, map_renderer
    from gravlens_jax.inference import outputs

    (model, variables), labels = network, dataset.labels
    differs = f"the images have the classes {', '.join(dataset.classes)}, the network has {', '.join(model.classes)}"
    check(dataset.classes == model.classes, f"{differs}; expected the same in the same order")
    render = map_renderer(dataset, model.input, model.pixel_scale)
    needed = "with their lens parameters, by this version, at the pixel scale of the network's training images"
    check(render is not None, f"expected simulated images {needed}; make some by scripts/simulate.py")
    assert render is not None
    logits, _, maps, light = outputs(model, variables, dataset.images, maps=True)
    true = render(np.arange(dataset.size))
    sigmas = find_significances(dataset, find_priors(dataset))
    right, weight = logits.argmax(1) == labels, (light >= VISIBLE)[..., None]
    error, size = (np.sqrt((array**2 * weight).sum((1, 2, 3))) for array in (maps - true, true))
    values: dict[str, Any] = {"recall": {}, "map_error": {}}
    for label, name in enumerate(model.classes):
        of_class = labels == label
        if sigmas[of_class].any():
            values["recall"][name] = bin_means(sigmas[of_class], right[of_class], SIGMAS)
            # Not a `sphere` lens whose number of subhalos is 0.
            some = of_class & (np.abs(true * weight).max((1, 2, 3)) > NO_DEFLECTION)
            values["map_error"][name] = bin_means(sigmas[some], error[some] / size[some], SIGMAS)
    dark = sigmas > 0
    squares = ((maps - true)[dark] ** 2).mean(-1).ravel()
    values["cell_error"] = [
        bin_ | {"mean": 1e3 * np.sqrt(bin_["mean"]), "error": 1e3 * bin_["error"] / 2 / np.sqrt(bin_["mean"])}
        for bin_ in bin_means(light[dark].ravel(), squares, LIGHTS)
    ]
    predicted, truth = maps[light >= VISIBLE], true[light >= VISIBLE]
    length = np.linalg.norm(predicted, axis=-1)
    values["slope"] = bin_means(length, (predicted * truth).sum(-1) / np.maximum(length, 1e-9) ** 2, LENGTHS)
    peaks = convergence(maps, network.cell_width).max((1, 2))[sigmas == 0]
    values["no_peak"] = float(np.quantile(peaks, 0.999)) if len(peaks) else None
    return values


def draw(path: Path, values: dict[str, Any]) -> None:
    """Draws the result of `measure` as a PNG."""
    from gravlens_jax.report import COLOURS, new_figure, save_figure

    figure = new_figure(10, 6.4, dpi=90)
    panels = figure.subplots(2, 2).ravel()

    def plot(axes, bins, limits, **options):
        edges = np.clip([[b["low"], b["high"]] for b in bins], *limits)
        centres = np.sqrt(edges[:, 0] * edges[:, 1])
        axes.errorbar(centres, [b["mean"] for b in bins], [b["error"] for b in bins], fmt="o-", ms=4, **options)
        axes.set(xscale="log")
        axes.grid(alpha=0.3)
        return edges

    for number, (name, title) in enumerate((("recall", "recall"), ("map_error", "relative error of the map"))):
        for k, (label, bins) in enumerate(values[name].items()):
            low, high = plot(panels[number], bins, (4, 150), color=COLOURS[k], label=label).T
            share = np.array([b["n"] for b in bins]) / sum(b["n"] for b in bins)
            panels[number].bar(low, share, high - low, align="edge", color=COLOURS[k], alpha=0.15)
        panels[number].set(xlabel="significance of the substructure [sigma]", ylabel=title, ylim=(0, 1.05))
    panels[0].legend(title="bars: share of the lenses", frameon=False, fontsize=8, loc="center right")
    plot(panels[2], values["cell_error"], (5e-3, 1), color="0.3")
    panels[2].set(xlabel="mean pixel in the cell", ylabel="error of the deflection [mas]", ylim=(0, None))
    plot(panels[3], values["slope"], (5e-4, 0.2), color="0.3")
    panels[3].axhline(1, color="0.6", ls=":")
    panels[3].set(xlabel="predicted deflection [arcsec]", ylabel="true / predicted", ylim=(0, 1.5))
    save_figure(figure, path)


def main(
    run: cli.Run,
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
) -> None:
    """Writes OUT/limits.json and OUT/limits.png: recall and errors of maps against significance and light.

    The significance of a lens is that of the detection of its substructure, in standard deviations of the photon noise,
    after every smooth parameter was fitted: an upper limit.

    examples:
      python scripts/limits.py pretrained data/mine/test.npz limits

    Args:
        data: .npz of simulated images; 1,000 take about a minute.
        out: folder to write to; existing files are replaced.
    """
    from gravlens_jax.inference import check_deflection
    from gravlens_jax.network import load_network
    from gravlens_jax.npz import open_npz

    network = load_network(run)
    check_deflection(*network)
    values = measure(network, open_npz(data))
    write_atomically(out / "limits.json", json.dumps(values, indent=2) + "\n")
    draw(out / "limits.png", values)
    print(out)


if __name__ == "__main__":
    cli.run_function(main)
