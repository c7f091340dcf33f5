"""Each launch says that a multiplication and an addition are fused: the default is another from Triton to Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from meta import needs_meta_products

pytestmark = [pytest.mark.slow, needs_meta_products]


def test_no_launch_leaves_fusion_to_the_default():
    program = """
import json
from loraga.kernels.dev import launches, workloads
names = sorted({name for module in launches.families() for name in vars(module) if name.endswith("_kernel")})
recorded = [build.launch for build in workloads.builds(90, every=False)]
print(json.dumps([names, sorted({(launch.kernel, launch.options["enable_fp_fusion"]) for launch in recorded})]))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    names, recorded = json.loads(done.stdout)
    assert names and recorded == [[name, True] for name in names]
