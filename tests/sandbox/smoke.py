"""Draws with everything that the image has, and leaves the drawings where it works."""
import subprocess

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import polars as pl
import pygraphviz

x = np.linspace(0, 2 * np.pi, 200)
frame = pd.DataFrame({"x": x, "sin": np.sin(x)})
assert pl.from_dict({"sin": frame["sin"].tolist()})["sin"].len() == 200
figure, axes = plt.subplots()
axes.plot(frame["x"], frame["sin"], label="sin")
axes.legend()
figure.savefig("plot.png")
figure.savefig("plot.pdf")

graph = nx.DiGraph([("claim", "run"), ("run", "end")])
nx.nx_pydot.write_dot(graph, "graph.dot")
subprocess.run(["dot", "-Tsvg", "graph.dot", "-o", "graph.svg"], check=True)
assert len(pygraphviz.AGraph("graph.dot").nodes()) == 3

with open("flow.mmd", "w") as flow:
    flow.write("graph TD\n  claim --> run\n  run --> done\n")
subprocess.run(["mmdc", "--quiet", "--input", "flow.mmd", "--output", "flow.svg"], check=True)
print("drawn")
