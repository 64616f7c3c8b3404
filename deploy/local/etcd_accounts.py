"""Makes a new etcd ask for a password: its users, what they may, and authentication itself."""

import asyncio
from pathlib import Path

import aetcd
from aetcd import rpc

from deploy.local.certificates import USERNAME, files_of
from deploy.local.cluster import ClusterError
from libs.common.credentials import ServerAccess, secret_in
from libs.common.etcd_client import EtcdClient
from libs.common.identity import CLIENT

ROOT = "root"
_PREFIX = b"/switchgear/"
_PREFIX_END = b"/switchgear0"  # The byte after the slash: all keys that begin with the prefix.
_START_SECONDS = 30.0
_CALL_SECONDS = 5
_RETRY_SECONDS = 0.1


def require_passwords(etcd_url: str, folder: Path) -> None:
    """Of an etcd that is just starting, with the passwords in the folder. Raises ClusterError when
    it does not answer in time."""
    try:
        asyncio.run(_require_passwords(etcd_url, folder))
    except (TimeoutError, aetcd.ClientError, rpc.AioRpcError) as error:
        raise ClusterError(f"etcd at {etcd_url} takes no users: {error!r}") from error


async def _require_passwords(etcd_url: str, folder: Path) -> None:
    access = ServerAccess(files_of(folder, CLIENT))
    client = EtcdClient(etcd_url, access, _CALL_SECONDS, {"grpc.enable_http_proxy": 0})
    async with asyncio.timeout(_START_SECONDS), client:
        await _until_it_answers(client)
        auth = rpc.AuthStub(client.channel)
        await auth.RoleAdd(rpc.AuthRoleAddRequest(name=USERNAME))
        everything_of_ours = rpc.Permission(
            permType=rpc.Permission.READWRITE, key=_PREFIX, range_end=_PREFIX_END
        )
        await auth.RoleGrantPermission(
            rpc.AuthRoleGrantPermissionRequest(name=USERNAME, perm=everything_of_ours)
        )
        passwords = {ROOT: "etcd_root.password", USERNAME: "etcd.password"}
        for user, file in passwords.items():
            await auth.UserAdd(rpc.AuthUserAddRequest(name=user, password=secret_in(folder / file)))
            # etcd knows the role `root` by itself.
            await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=user, role=user))
        await auth.AuthEnable(rpc.AuthEnableRequest())


async def _until_it_answers(client: EtcdClient) -> None:
    while True:
        try:
            await client.get(_PREFIX)
            return
        except aetcd.ClientError:
            await asyncio.sleep(_RETRY_SECONDS)
