"""The arms of benchmarks/throughput.py that run the programs of docs/performance.md as a user would."""

import ast
import os
import re
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks.throughput_cells import Cell
from benchmarks.throughput_jax import Ours

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGE = os.path.join(ROOT, "docs", "performance.md")
GIVEN = {"model", "images", "labels", "variables"}  # what the cell determines


def program(title: str) -> str:
    """Return the Python code under a title of the page, such as "Inference"."""
    with open(PAGE) as file:
        found = re.findall(rf"^{title}:\n\n```python\n(.*?)^```", file.read(), re.DOTALL | re.MULTILINE)
    (code,) = found
    return str(code)


def without_given(code: str) -> ast.Module:
    """Return the code without the imports of vgg_jax, the values in GIVEN, and the calls of the last line."""
    tree = ast.parse(code)

    def is_given(statement: ast.stmt) -> bool:
        names = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        return isinstance(statement, ast.Assign) and bool(names) and names <= GIVEN

    tree.body = [statement for statement in tree.body[:-1] if not is_given(statement)]
    return tree


class Program(Ours):
    """The programs for inference and for training with plain optax."""

    title: ClassVar[str] = "Inference"

    def __init__(self, cell: Cell, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(cell, weights, images, labels)
        self.run(self.title)

    def run(self, title: str) -> None:
        """Run a program with the model, the weights and the batch of the cell."""
        self.names: dict[str, Any] = dict(
            model=self.model,
            variables=self.variables,
            images=self.batch["image"],
            labels=self.batch["label"],
        )
        exec(compile(without_given(program(title)), PAGE, "exec"), self.names)

    def logits(self) -> Any:
        """Return the logits of the batch, in evaluation mode."""
        return self.names["predict"](self.variables, self.batch["image"])

    def start_training(self) -> None:
        """Create the state of the optimizer; the steps donate it and the variables."""
        self.run("Training with plain optax")
        self.state: Any = (self.names.pop("variables"), self.names.pop("opt_state"))
        self.variables = {}

    def step(self) -> Any:
        """Run one step; return the logits, or the loss before the update."""
        if self.cell.mode == "infer":
            return self.logits()
        *state, loss = self.names["train_step"](
            *self.state, self.batch["image"], self.batch["label"], jax.random.key(2)
        )
        self.state = tuple(state)
        return loss


class ThroughNetwork(Program):
    """The program for inference through `Network`."""

    title = "Inference through `Network`"

    def logits(self) -> Any:
        """Return the logits of the batch, in evaluation mode."""
        return self.names["net"](self.batch["image"])


class Optimized(Program):
    """The program for inference by a network that is optimized for it."""

    title = "Optimized inference"

    def run(self, title: str) -> None:
        """Run the program, which replaces the variables."""
        super().run(title)
        self.variables = self.names["variables"]

    def start_training(self) -> None:
        """Refuse training."""
        raise ValueError("the network is optimized for inference; expected a cell of inference")
