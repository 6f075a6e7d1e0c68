"""The signed part of resolve.resolve and runtime.trust.refresh: when is asked, and what is refused."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from runtime.config import Config
from runtime.errors import ConfigError, InstallError, SourceError, UntrustedError
from tests.trust.repository import PAST, A, B, C, Looker, Repository

ROOT = Path(__file__).parents[2]


# -- when is asked ----------------------------------------------------------------------------------------------------


def test_only_what_was_never_verified_is_asked_for(repository, client):
    settings = client.settings
    assert resolve(repository, settings) == {"sm_120": A}
    repository.asked.clear()
    repository.release(B)
    assert resolve(repository, settings) == {"sm_120": A} and repository.asked == []
    assert resolve(repository, settings, newest=True) == {"sm_120": B}


def resolve(repository: Repository, settings: Config, newest: bool = False) -> dict[str, str]:
    from runtime.trust import resolve

    source: object = repository
    return resolve.resolve(source, settings.channel, (), None, settings, newest)  # type: ignore[arg-type]


def test_max_age_bounds_how_old_a_warm_state_may_be(repository, client, monkeypatch):
    resolve(repository, client.settings)
    repository.release(B)
    aged = client.settings._replace(max_age=60)
    assert resolve(repository, aged) == {"sm_120": A}
    now = time.time()
    for skew in (61, -61):  # a clock that was set back proves nothing either
        monkeypatch.setattr(time, "time", lambda skew=skew: now + skew)
        assert resolve(repository, aged._replace(max_age=None)) == {"sm_120": A}
        offline = aged._replace(offline=True)
        with pytest.raises(SourceError, match="more than 60 s ago") as error:
            resolve(repository, offline)
        assert error.value.reason == "stale"
    assert resolve(repository, aged) == {"sm_120": B}


def test_offline_asks_nobody(repository, client):
    offline = client.settings._replace(offline=True)
    with pytest.raises(SourceError, match="was never verified here") as error:
        resolve(repository, offline)
    assert error.value.reason == "offline" and repository.asked == []
    resolve(repository, client.settings)
    repository.asked.clear()
    assert resolve(repository, offline) == {"sm_120": A} and repository.asked == []


def test_a_failed_refresh_leaves_the_warm_state(repository, client):
    client.refresh()

    def broken(path: str) -> None:
        raise SourceError("no route", reason="unreachable")

    repository.before_answer = broken
    with pytest.raises(SourceError) as error:
        client.refresh()
    assert error.value.reason == "unreachable" and not isinstance(error.value, UntrustedError)
    assert client.warm() == {"sm_120": A}


def test_a_yanked_digest_is_refused_after_the_next_refresh(repository, client):
    client.refresh()
    repository.name("stable", A, yanked=(A, C))
    repository.release()
    assert client.warm() == {"sm_120": A}
    assert client.refused() == "yanked"
    with pytest.raises(UntrustedError, match="yanked"):
        client.warm()
    repository.name("stable", B, yanked=(A, C))
    repository.release()
    assert client.refresh() == {"sm_120": B}


def test_a_root_that_others_can_write_is_refused(repository, client):
    path = Path(client.settings.root)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="nobody else can write"):
        client.refresh()
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        client.refresh()
    assert repository.asked == []


def test_without_tuf_the_extra_is_named(client, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("tuf", "registry.releases"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tuf.api", None)
    with pytest.raises(InstallError, match=r"cubinery\[remote\]"):
        client.refresh()


def test_a_folder_claims_no_freshness_but_targets_must_not_expire(repository, tmp_path):
    """What lies on a disk cannot be fresher than it is: signatures, versions and the targets' expiry count."""
    repository.timestamp.expires = repository.snapshot.expires = repository.root.expires = PAST
    repository.publish("root")
    repository.release(B)
    client = Looker(repository, tmp_path / "bundle", registry="/media/bundle")
    assert client.refresh() == {"sm_120": B}
    found = client.state.read("stable")
    assert found is not None and found.timestamp_expires == PAST.timestamp()  # from which doctor tells its age
    assert Looker(repository, tmp_path / "server").refused() == "expired"
    older = dict(repository.files)
    repository.release(C)
    assert client.refresh() == {"sm_120": C}
    repository.files = older
    assert client.refused() == "rollback"
    repository.targets.expires = PAST
    repository.release()
    repository.release()
    assert client.refused() == "expired"
