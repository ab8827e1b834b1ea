"""The recipes for clusters start processes that know which one they are, with flags that exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from test_readme import test_readme_commands_have_the_flags_they_show as check_command

from jaxinfer.communication.membership import find_membership

DEPLOY = Path(__file__).parents[1] / "configs" / "deploy"
SBATCH = DEPLOY / "slurm.sbatch"
SERVICE, JOB = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
FIELDS = {  # the fields of each kind of object, as the API reference of Kubernetes has them
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "labels", "annotations"},
    "service": {"clusterIP", "publishNotReadyAddresses", "selector"},
    "job": {"completionMode", "completions", "parallelism", "backoffLimit", "template"},
    "pod": {"subdomain", "restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"},
    "container": {"name", "image", "command", "env", "resources", "volumeMounts"},
}


def test_kubernetes_objects_have_only_known_fields():
    for found, kind in (
        (SERVICE, ""),
        (JOB, ""),
        (SERVICE["metadata"], "metadata"),
        (SERVICE["spec"], "service"),
        (JOB["spec"], "job"),
        (POD, "pod"),
        (CONTAINER, "container"),
    ):
        assert set(found) <= FIELDS[kind]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


@pytest.mark.parametrize("index", [0, 1])
def test_kubernetes_pods_find_their_numbers_and_the_name_of_the_first(index):
    given = {entry["name"]: entry.get("value", "from the Secret") for entry in CONTAINER["env"]}
    found = find_membership(given | {"JOB_COMPLETION_INDEX": str(index)})
    assert (found.process_id, found.num_processes) == (index, JOB["spec"]["completions"])
    first = f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}"
    assert found.address == f"{first}:12421" and POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert JOB["spec"]["parallelism"] == JOB["spec"]["completions"]


def srun_command() -> str:
    text = SBATCH.read_text().replace("\\\n", " ")
    return re.search(r"^srun \S+ (jaxinfer .*)$", text, re.MULTILINE)[1]


@pytest.mark.parametrize("command", [shlex.join(CONTAINER["command"]), srun_command()], ids=["kubernetes", "slurm"])
def test_commands_have_the_flags_they_show(command):
    check_command(command.replace("=", " "))


def test_slurm_script_is_a_script_of_bash_that_shellcheck_accepts():
    subprocess.run(["bash", "-n", SBATCH], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", SBATCH], check=True)


def test_slurm_tasks_find_their_numbers():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SBATCH.read_text(), re.MULTILINE))
    nodes = int(options["nodes"])
    assert options["ntasks-per-node"] == "1"
    for node in range(nodes):
        found = find_membership(
            {
                "SLURM_JOB_ID": "12",
                "SLURM_STEP_NODELIST": "gpu[3-4]",
                "SLURM_STEP_NUM_TASKS": str(nodes),
                "SLURM_PROCID": str(node),
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": str(node),
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "JAXINFER_SECRET": "made by openssl",
            }
        )
        assert (found.process_id, found.num_processes, found.address) == (node, nodes, "gpu3:51012")
        assert found.num_local_processes == 1
