"""Former name of ``python -m inference.tsne``; removed in the next version."""

import runpy

runpy.run_module("inference.tsne", run_name="__main__", alter_sys=True)
