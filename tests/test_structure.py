"""The directions in which the rooms may import each other, and what a built wheel holds."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "config": {"export"},
    "presets": {"config", "export"},
    "manifest": {"config", "__version__"},
    "image": {"jobs", "manifest"},
    "colour": {"image"},
    "jobs": set(),
    "painting": (
        {"checkpoint", "config", "goal", "image", "jobs", "manifest", "result", "stylizer", "targets", "__version__"}
    ),
    "film": {"image", "jobs", "export"},
    "video": {
        "colour",
        "config",
        "film",
        "goal",
        "image",
        "jobs",
        "manifest",
        "motion",
        "presets",
        "stylizer",
    },
    "batches": {"config", "manifest", "image", "jobs", "painting", "presets", "replay", "stylizer"},
    "sheet": {"config", "image", "jobs", "manifest", "painting", "stylizer", "export"},
    "replay": {"config", "image", "jobs", "manifest", "painting", "stylizer"},
    "provider": {"config", "export", "kernels"},
    "features": {"fused", "session", "winograd", "export", "kernels"},
    "session": {"features", "provider", "export", "kernels"},
    "fused": {"convolutions", "features", "provider", "export", "kernels"},
    "convolutions": {"image", "export", "kernels"},
    "winograd": {"features", "export", "kernels"},
    "regions": {"features", "image", "targets", "kernels"},
    "targets": {"image", "export"},
    "cache": set(),
    "motion": {"image", "export", "kernels"},
    "goal": {"colour", "config", "image", "motion", "regions", "targets", "export"},
    "stages": set(),
    "losses": {"config", "features", "kernels", "regions", "stages", "targets"},
    "autograd": {"losses"},
    "optimize": {"config", "kernels", "stages"},
    "checkpoint": set(),
    "networks": {"features", "provider", "export"},
    "windows": {"config", "features", "export", "kernels"},
    "doctor": {"config", "export", "forecast", "jobs", "manifest", "provider", "samples", "stylizer"},
    "result": {"regions", "checkpoint", "colour", "config", "image", "optimize"},
    "start": {"config", "image", "optimize", "export"},
    "stylizer": (
        {
            "cache",
            "checkpoint",
            "colour",
            "config",
            "features",
            "forecast",
            "goal",
            "image",
            "losses",
            "manifest",
            "motion",
            "networks",
        }
        | {"optimize", "provider", "regions", "result", "start", "targets", "windows", "export", "kernels"}
    ),
    "forecast": {
        "cache",
        "config",
        "features",
        "fused",
        "goal",
        "image",
        "networks",
        "optimize",
        "provider",
        "windows",
        "winograd",
        "export",
        "kernels",
    },
    "batch": {"batches", "config", "provider", "image", "jobs", "manifest", "painting", "stylizer", "export"},
    "stylize": (
        {
            "batches",
            "config",
            "image",
            "jobs",
            "manifest",
            "painting",
            "presets",
            "provider",
            "replay",
            "sheet",
            "video",
        }
        | {"samples", "stylizer", "export", "__version__"}
    ),
    "__init__": {"config", "presets", "result", "stylizer", "targets", "export"},
}


def imports(path: Path) -> set[tuple[int, str]]:
    """(level, name) of the first component of every relative import, and (0, name) of absolute ones."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name.split(".")[0]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add((node.level, node.module.split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "engine").glob("*.py")), ids=lambda path: path.stem)
def test_engine_imports_in_one_direction(path):
    assert {name for level, name in imports(path) if level} <= ALLOWED[path.stem]


@pytest.mark.parametrize("room", ["kernels", "export"])
def test_kernels_and_export_import_nothing_of_the_others(room):
    own = {path.stem for path in (ROOT / room).glob("*.py")}
    for path in (ROOT / room).glob("*.py"):
        for level, name in imports(path):
            assert level <= 1, f"{path.name} reaches out of {room}"
            if level == 1:
                assert name in own, f"{path.name}: {name}"
            else:
                assert name not in ("engine", "kernels", "export"), f"{path.name}: {name}"


def test_the_service_is_used_by_nobody_and_its_server_loads_no_torch():
    for room in ("engine", "kernels", "export"):
        for path in (ROOT / room).glob("*.py"):
            assert "serve" not in {name for _, name in imports(path)}, path
    code = "import sys, engine.serve.api; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_heavy_libraries_stay_in_their_rooms():
    for path in (ROOT / "engine").glob("*.py"):
        names = {name for level, name in imports(path) if level == 0}
        assert not names & {"cupy", "onnxruntime"}, path.name
        assert path.stem in ("film", "motion") or not names & {"av", "cv2"}, path.name
    for path in (ROOT / "kernels").glob("*.py"):
        assert "onnxruntime" not in {name for _, name in imports(path)}
        top = {
            alias.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "cupy" not in top, "CuPy is imported when a kernel is launched"


def test_files_stay_short():
    for room in ("engine", "engine/serve", "kernels", "export", "benchmarks"):
        for path in (ROOT / room).glob("*.py"):
            assert len(path.read_text().splitlines()) < 500, path


def test_importing_changes_nothing(tmp_path):
    code = (
        "import os, sys, threading\n"
        "import engine\n"
        "assert 'torch' not in sys.modules and 'engine.stylize' not in sys.modules\n"
        "import torch\n"
        "before = torch.get_num_threads(), torch.get_default_dtype(), sorted(os.listdir('.'))\n"
        "engine.Stylizer, engine.Step, engine.BackendError\n"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), sorted(os.listdir('.')))\n"
        "assert threading.active_count() == 1\n"
    )
    environment = {**os.environ, "STYLIZE_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert not list(tmp_path.iterdir())
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_public_names():
    import engine

    for name in engine.__all__:
        assert getattr(engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Stylizerr'"):
        _ = engine.Stylizerr


def test_wheel_holds_one_package_and_all_data(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("engine", "kernels", "export", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"engine"}
    wanted = {
        "engine/py.typed",
        "engine/samples/content.jpg",
        "engine/samples/style.jpg",
        "engine/serve/page/index.html",
        "engine/serve/page/page.js",
        "engine/serve/page/page.css",
        "engine/serve/page/icon.svg",
        "engine/export/vgg19-embedded.safetensors",
    }
    for path in (ROOT / "kernels").glob("*.cu*"):
        wanted.add(f"engine/kernels/{path.name}")
    assert wanted <= names
    assert not [name for name in names if "test" in name or "benchmark" in name]


def test_samples_are_small_and_the_style_can_be_drawn_again():
    from engine.samples import draw_style

    for name in ("content.jpg", "style.jpg"):
        assert (ROOT / "engine" / "samples" / name).stat().st_size < 150_000
    with Image.open(ROOT / "engine" / "samples" / "style.jpg") as picture:
        kept = np.asarray(picture.convert("RGB"), float)
    assert np.abs(np.asarray(draw_style.draw(), float) - kept).mean() < 8  # JPEG of quality 82
