"""All notebooks in a real JupyterLab in Chromium: opening one does not change it, and Run All comes to its end.

Slow: a smoke run in a browser. `make browser` runs it. Skipped where no Chromium or Chrome is installed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from medkit.reporting import STAGES
from medkit.stage import ROOT

pytestmark = pytest.mark.slow
TOKEN = "of-this-test"
LAPTOP = {"width": 1366, "height": 768}
LABS = sorted(f"labs/{path.stem}" for path in (ROOT / "notebooks" / "labs").glob("*.ipynb"))
NOTEBOOKS = ["00_start", *STAGES, *LABS, *(f"solutions/{stage}_exercises" for stage in STAGES)]
OPEN = """async (path) => {
  const panel = await window.jupyterapp.commands.execute("docmanager:open", {path, factory: "Notebook"});
  await Promise.all([panel.context.ready, panel.revealed, panel.sessionContext.ready]);
  await new Promise((done) => setTimeout(done, 3000));  // what marks a notebook as changed comes after it is ready
  return panel.context.model.dirty;
}"""
RUN_ALL = """async () => {
  const panel = window.jupyterapp.shell.currentWidget;
  await window.jupyterapp.commands.execute("notebook:run-all-cells");
  const cells = panel.context.model.toJSON().cells.filter((cell) => cell.cell_type === "code");
  const wide = [...panel.node.querySelectorAll(".jp-OutputArea-output img")]
    .filter((image) => image.getBoundingClientRect().right > window.innerWidth).length;
  return {cells, wide};
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on a copy of the notebooks; its settings and its runs are this test's own."""
    work = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "params", "docs"):
        shutil.copytree(ROOT / name, work / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {"MEDKIT_OUTPUTS": "outputs", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data"}
    environment = {**os.environ, **{name: str(work / folder) for name, folder in folders.items()}}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    address = f"http://127.0.0.1:{port}"
    with (work / "log").open("w") as log:
        server = subprocess.Popen([*command, f"--ServerApp.root_dir={work}"], env=environment, stderr=log, cwd=work)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None, (work / "log").read_text()
                    time.sleep(0.5)
            yield f"{address}/lab?token={TOKEN}"
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def tab(chromium, lab):
    page = chromium.new_page(viewport=LAPTOP)
    page.goto(lab)
    page.wait_for_function("window.jupyterapp && window.jupyterapp.restored", timeout=120_000)
    page.evaluate("window.jupyterapp.restored.then(() => true)")
    yield page
    page.close()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_in_jupyterlab(tab, name, tmp_path):
    """In the order of the path, each after the ones that it reads; the screenshot is for a person."""
    changed = tab.evaluate(OPEN, f"notebooks/{name}.ipynb")
    assert not changed, "opening it marked it as changed"
    found = tab.evaluate(RUN_ALL)
    tab.screenshot(path=tmp_path / "end.png")
    errors = [
        f"{output['ename']}: {output['evalue']}"
        for cell in found["cells"]
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]
    assert errors == []
    silent = [cell["source"] for cell in found["cells"] if cell["source"] and not cell["execution_count"]]
    assert silent == [], json.dumps(silent)[:500]
    assert found["wide"] == 0, "a figure is wider than the screen of a laptop"
    tab.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    tab.evaluate("window.jupyterapp.commands.execute('application:close')")
