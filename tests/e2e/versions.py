"""A deployment whose services are each of this version or of the previous one, as asked."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from enum import Enum
from pathlib import Path

from deploy.delivery.previous import files_of, previous_commit
from deploy.local import topology
from deploy.local.cluster import LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.process import ProcessSpec
from deploy.local.topology import REPOSITORY, Component, Deployment
from tests.e2e.right_answers import Frontends
from tests.e2e.running import Running

SERVICES: tuple[Component, ...] = (
    "kv_indexer",
    "router",
    "prefill_worker",
    "decode_worker",
    "frontend",
)
CACHE = REPOSITORY / "build" / "versions"
READY_SECONDS = 120.0

_PORT = re.compile(r"\b[123]\d{4}\b")

# Each version's launcher knows its services' flags. It is told the deployment as JSON and knows or
# ignores what is in it.
_SPECS = """
import json, pathlib, sys
from deploy.local import ports, topology
deployment = topology.Deployment.model_validate_json(sys.stdin.read())
specs = topology.processes(deployment, pathlib.Path(sys.argv[1]), ports.FreePorts().take)
print(json.dumps([spec.model_dump(mode="json") for spec in specs]))
"""


class Version(Enum):
    PREVIOUS = "previous"
    CURRENT = "current"

    @property
    def other(self) -> Version:
        return Version.CURRENT if self is Version.PREVIOUS else Version.PREVIOUS


class MixedDeployment(Running):
    """Every service at first of the previous version. etcd and NATS are the same for all."""

    def __init__(
        self,
        cluster: LocalCluster,
        deployment: Deployment,
        specs: Mapping[Version, Mapping[str, ProcessSpec]],
    ) -> None:
        super().__init__(cluster, deployment)
        self._specs = specs
        self._versions = dict.fromkeys(self.names(*SERVICES), Version.PREVIOUS)
        self.frontends = Frontends(
            {name: specs[Version.CURRENT][name].address for name in self.names("frontend")}
        )

    def names(self, *components: Component) -> list[str]:
        """The processes of these components."""
        found = self._specs[Version.CURRENT]
        return [name for name in found if name.rpartition("-")[0] in components]

    async def set_apart(self, component: Component, version: Version) -> None:
        """Makes one component be of this version and everything else of the other one."""
        wanted = dict.fromkeys(self._versions, version.other)
        wanted |= dict.fromkeys(self.names(component), version)
        await self._replace({name for name in wanted if wanted[name] != self._versions[name]})

    async def set_all(self, version: Version) -> None:
        """Makes everything be of this version."""
        await self._replace({name for name in self._versions if self._versions[name] != version})

    async def roll(self, name: str) -> None:
        """Has a process drain and stop, and starts it again as the other version."""
        async with AsyncExitStack() as stack:
            if name in self.names("frontend"):
                await stack.enter_async_context(self.frontends.without(name))
            await self._replace({name})

    async def _replace(self, names: Collection[str]) -> None:
        for name in names:
            self._versions[name] = self._versions[name].other
        specs = [self._specs[self._versions[name]][name] for name in names]
        await asyncio.to_thread(self.cluster.replace, specs, READY_SECONDS)
        # A frontend whose workers were all replaced at once has to read the model's files again.
        await asyncio.to_thread(self.cluster.wait_ready, READY_SECONDS)


@contextmanager
def mixed(run_dir: Path, deployment: Deployment, ports: FreePorts) -> Iterator[MixedDeployment]:
    """Starts a deployment with all services of the previous version; stops all of it at the end.
    Each frontend has a port of its own, as behind Envoy, whose part clients play.

    Raises NoPreviousVersion.
    """
    files = files_of(REPOSITORY, previous_commit(REPOSITORY), CACHE)
    deployment = deployment.model_copy(update={"envoy": True})
    specs = topology.processes(deployment, run_dir, ports.take)
    current = {spec.name: spec for spec in specs if spec.name != "envoy-0"}
    previous = _specs_of(files, deployment, run_dir, current)
    with LocalCluster(run_dir) as cluster:
        cluster.start([previous.get(name, spec) for name, spec in current.items()])
        cluster.wait_ready(READY_SECONDS)
        services = {name: current[name] for name in previous}
        of_version = {Version.PREVIOUS: previous, Version.CURRENT: services}
        yield MixedDeployment(cluster, deployment, of_version)


def _specs_of(
    files: Path, deployment: Deployment, run_dir: Path, current: Mapping[str, ProcessSpec]
) -> dict[str, ProcessSpec]:
    """The services as another version's launcher starts them, with the ports that ours use."""
    done = subprocess.run(
        [sys.executable, "-c", _SPECS, str(run_dir)],
        cwd=files,
        env=os.environ | {"PYTHONPATH": str(files)},
        input=deployment.model_dump_json(),
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"the launcher in {files} failed: {done.stderr}"
    theirs = [ProcessSpec.model_validate(spec) for spec in json.loads(done.stdout)]
    ours = {
        str(port): str(current[spec.name].ports.get(kind, port))
        for spec in theirs
        if spec.name in current
        for kind, port in spec.ports.items()
    }
    moved = _PORT.sub(lambda port: ours.get(port[0], port[0]), done.stdout)
    specs = [ProcessSpec.model_validate(spec) for spec in json.loads(moved)]
    services = {spec.name: spec for spec in specs if spec.name.rpartition("-")[0] in SERVICES}
    for spec in services.values():
        assert spec.environment["PYTHONPATH"].startswith(str(files)), spec
    return services
