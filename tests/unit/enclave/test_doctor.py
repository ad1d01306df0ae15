# SPDX-License-Identifier: Apache-2.0
"""enclave doctor, on machines that are laid out in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from ec2_machine import lay_out

from enclavekit.enclave.doctor import Machine, diagnose
from enclavekit.enclave.doctor_nitro import check_capacity, nitro_findings
from enclavekit.enclave.findings import State
from enclavekit.errors import LaunchError, MissingError, NoKernelError, NoQemuError, NotEnoughMemoryError
from enclavekit.hypervisor.accel import Accel, Choice
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, Selected
from enclavekit.hypervisor.contract import Enclave, LaunchSpec
from enclavekit.runtime import Kernel, Qemu

DEVICES = 'name "vhost-user-vsock-device", bus virtio-bus\nname "i8042", bus ISA\nname "vhost-user-test-device"\n'


class Carrier:
    def create(self, spec: LaunchSpec) -> Enclave:
        raise NotImplementedError


def select(name: CarrierName, options: CarrierOptions) -> Selected:
    del options
    return Selected(name, Carrier(), "fake")


def machine(root: Path, *, accel: Accel = Accel.KVM) -> Machine:
    def run(command: Sequence[str], environment: Mapping[str, str]) -> str:
        del command, environment
        return DEVICES

    return Machine(
        carriers=CarrierOptions(runtime_root=root, choose_accel=lambda wanted: Choice(wanted or accel, "measured")),
        runtime_directory=root / "run",
        data_directory=root / "data",
        cache_directory=root / "cache",
        root=root,
        select=select,
        find_qemu=lambda root, override, path: Qemu(("/bin/loader", "/bin/qemu-system-x86_64"), (11, 1, 0)),
        find_kernel=lambda root: Kernel("6.12", Path("/vmlinuz"), None),
        run=run,
        free_disk=lambda path: 1 << 40,
        groups=frozenset(),
        uid=0,
    )


def said(found: Sequence[object]) -> dict[str, str]:
    """By name, state and message."""
    return {one.name: f"{one.state}: {one.message}" for one in found}  # type: ignore[attr-defined]


def nitro(root: Path, uid: int = 0) -> dict[str, str]:
    return said(list(nitro_findings(root, uid, frozenset())))


# nitro ----------------------------------------------------------------------------------------------------------------


def test_an_instance_with_all_it_needs(tmp_path: Path) -> None:
    lay_out(tmp_path, pool="1,5", pages=(256, 0))
    found = nitro(tmp_path)
    group = found.pop("node")
    assert group.startswith("ok: /dev/nitro_enclaves: ")
    assert found == {
        "device": "ok: PCI device 1d0f:e4c1",
        "cpus": "ok: 2 in the pool: 1,5",
        "huge pages": (
            "ok: NUMA node 0: 512 MiB free (0 of 0 of 1024 MiB, 256 of 256 of 2 MiB); 2050 MiB more could be made now"
        ),
        "vsock": "ok: /dev/vsock",
    }


def test_no_instance(tmp_path: Path) -> None:
    (only,) = nitro_findings(tmp_path, 0, frozenset())
    assert only.state is State.MISSING
    assert only.message.startswith("no Nitro Enclaves device: ")
    assert only.remedy is not None


def test_an_instance_as_it_starts(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "dev/vsock").unlink()
    (tmp_path / "proc/buddyinfo").write_text("Node 0, zone   Normal  9 9 9 9 9 9 9 9 9 0 0\n")
    found = nitro(tmp_path)
    assert found["cpus"] == "missing: the pool of CPUs is empty"
    assert found["huge pages"].startswith("missing: NUMA node 0: 0 MiB free")
    assert found["fragmentation"] == "warning: NUMA node 0: its free memory is in pieces smaller than 2 MiB"
    assert found["vsock"].startswith("missing: ")


def test_no_driver_and_no_device_node(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "sys/module/nitro_enclaves").rename(tmp_path / "gone")
    (tmp_path / "dev/nitro_enclaves").unlink()
    found = nitro(tmp_path)
    assert found["driver"] == "missing: the module nitro_enclaves is not loaded"
    assert found["node"] == "missing: /dev/nitro_enclaves: no such file or directory"
    assert "cpus" not in found


@pytest.mark.parametrize(
    ("mode", "uid", "groups", "state"),
    [
        (0o660, 0, frozenset(), State.OK),
        (0o660, 4711, frozenset(), State.MISSING),
        (0o660, 4711, "its", State.OK),
        (0o600, 4711, "its", State.MISSING),
        (0o666, 4711, frozenset(), State.OK),
    ],
)
def test_who_may_open_the_node(tmp_path: Path, mode: int, uid: int, groups: object, state: State) -> None:
    lay_out(tmp_path)
    node = tmp_path / "dev/nitro_enclaves"
    node.chmod(mode)
    mine = frozenset({node.stat().st_gid}) if groups == "its" else frozenset()
    (found,) = [one for one in nitro_findings(tmp_path, uid, mine) if one.name == "node"]
    assert found.state is state


def test_pages_that_are_of_no_use(tmp_path: Path) -> None:
    lay_out(tmp_path, pool="2,6", pages=(64, 32))
    assert nitro(tmp_path)["numa"] == (
        "warning: 128 MiB of huge pages are on other NUMA nodes than the CPUs: of no use"
    )
    for name in ("nr_hugepages", "free_hugepages"):
        (tmp_path / "sys/devices/system/node/node1/hugepages/hugepages-1048576kB" / name).write_text("2")
        (tmp_path / "sys/devices/system/node/node1/hugepages/hugepages-2048kB" / name).write_text("0")
    assert nitro(tmp_path)["page size"].startswith("warning: only pages of 1024 MiB are free")


def test_a_container_without_huge_pages(tmp_path: Path) -> None:
    lay_out(tmp_path, pool="1,5", pages=(256, 0))
    (tmp_path / "sys/fs/cgroup/own/hugetlb.2MB.max").write_text("0\n")
    assert nitro(tmp_path)["cgroup"] == "missing: this control group may use no huge pages of 2MB"


def test_what_an_enclave_would_be_given(tmp_path: Path) -> None:
    lay_out(tmp_path, pool="1,5", pages=(256, 0))
    assert check_capacity(tmp_path, memory=512 << 20, cpus=2) == (
        "2 CPUs in the pool, 512 MiB of huge pages free on NUMA node 0"
    )
    with pytest.raises(LaunchError, match=r"^CPUs: got 4, the pool has 2$"):
        check_capacity(tmp_path, memory=512 << 20, cpus=4)
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_capacity(tmp_path, memory=514 << 20, cpus=2)
    assert caught.value.message == (
        "memory: the enclave is to have 514 MiB, NUMA node 0 has 512 MiB of huge pages free"
    )
    (tmp_path / "dev/vsock").unlink()
    with pytest.raises(MissingError, match=r"^vsock: no /dev/vsock"):
        check_capacity(tmp_path, memory=512 << 20, cpus=2)


# the others -----------------------------------------------------------------------------------------------------------


def test_all_carriers_work(tmp_path: Path) -> None:
    lay_out(tmp_path, pool="1,5", pages=(256, 0))
    (tmp_path / "dev/kvm").touch()
    found = diagnose(machine(tmp_path))
    assert found.works == dict.fromkeys(CarrierName, True)
    assert found.chosen is CarrierName.NITRO
    assert {one.state for one in found.findings} == {State.OK}
    assert said(found.findings)["program"] == "ok: QEMU 11.1.0: /bin/qemu-system-x86_64"


def test_a_laptop_whose_kvm_emulates(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kvm").touch()
    found = diagnose(machine(tmp_path, accel=Accel.TCG))
    assert found.works == {CarrierName.NITRO: False, CarrierName.QEMU: True, CarrierName.KVM: False}
    assert found.chosen is CarrierName.QEMU
    words = said(found.findings)
    assert words["accelerator"] == "warning: tcg: measured; a boot takes some ten times as long"
    assert words["speed"] == "missing: measured"


def test_nothing_works(tmp_path: Path) -> None:
    def no_qemu(root: Path, override: str | None, path: str) -> Qemu:
        raise NoQemuError("no QEMU", hint="enclave runtime install")

    def no_kernel(root: Path) -> Kernel:
        raise NoKernelError("no kernel", hint="enclave runtime install")

    found = diagnose(replace(machine(tmp_path), find_qemu=no_qemu, find_kernel=no_kernel, free_disk=lambda path: 0))
    assert found.chosen is None
    assert not any(found.works.values())
    words = said(found.findings)
    assert words["program"] == "missing: no QEMU"
    assert words["device"].startswith("missing: no /dev/kvm") or words["device"].startswith("missing: no Nitro")
    assert words["kernel"] == "warning: no kernel: images with a kernel of their own can run"
    assert words["disk of cache"] == f"warning: {tmp_path}/cache: 0 MiB free"
    assert words["memory"] == "warning: the kernel does not say how much is available"
    assert words["cgroups"] == "warning: no cgroup v2: run --cgroup does not work"
    assert all(one.remedy for one in found.findings if one.state is not State.OK)


def test_a_qemu_without_the_device(tmp_path: Path) -> None:
    lacking = replace(machine(tmp_path), run=lambda command, environment: 'name "i8042"')
    words = said(diagnose(lacking).findings)
    assert words["devices"] == "missing: QEMU has no vhost-user-vsock-device"
    assert words["attestation"] == "warning: QEMU has no vhost-user-test-device: enclaves cannot attest"

    def broken(command: Sequence[str], environment: Mapping[str, str]) -> str:
        raise MissingError("/bin/loader: cannot be run")

    found = diagnose(replace(machine(tmp_path), run=broken))
    assert not found.works[CarrierName.QEMU]


def test_a_carrier_that_says_no_is_believed(tmp_path: Path) -> None:
    def refuse(name: CarrierName, options: CarrierOptions) -> Selected:
        raise MissingError(f"carrier {name}: no", hint="another")

    found = diagnose(replace(machine(tmp_path), select=refuse))
    assert not any(found.works.values())
    assert [one.message for one in found.findings if one.name == "carrier"] == ["carrier qemu: no"]
