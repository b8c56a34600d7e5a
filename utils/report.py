"""Former name of ``python -m report``; removed in the next version."""

import runpy

runpy.run_module("report", run_name="__main__", alter_sys=True)
