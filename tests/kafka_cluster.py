"""A real Apache Kafka for tests, without Docker: Maven fetches it once, Java runs one or three brokers on loopback.

A Kafka that runs already is taken from the environment variable CITYBRAIN_TEST_KAFKA (HOST:PORT); what kills brokers is
then left out. Where neither is possible the tests are skipped and say why, but with CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import NoReturn

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.conftest import eventually, unused_port

VERSION = "3.9.1"
VARIABLE = "CITYBRAIN_TEST_KAFKA"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / f"citybrain-kafka-{VERSION}"
POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>citybrain</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
<dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
<dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
</dependencies></project>
"""
# A small JVM that is up quickly; nothing here measures the broker.
JAVA = ("-Xmx384m", "-Xms128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto")
QUIET = ("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",)


def impossible(why: str) -> NoReturn:
    """Skip, or fail where this is CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"Kafka is needed: {why}")
    pytest.skip(f"no Kafka: {why}; or set {VARIABLE}=HOST:PORT")


def artifacts() -> str:
    """Return Kafka's class path, fetched with Maven the first time."""
    java, maven = shutil.which("java"), shutil.which("mvn")
    if java is None:
        impossible("java is not installed (apt-get install default-jre-headless)")
    if not CACHE.exists():
        if maven is None:
            impossible("mvn is not installed (apt-get install maven)")
        beside = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
        beside.mkdir(parents=True)
        (beside / "pom.xml").write_text(POM)
        argv = [maven, "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib"]
        done = subprocess.run(argv, cwd=beside, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            shutil.rmtree(beside)
            impossible(f"Maven could not fetch it: {(done.stdout + done.stderr)[-500:]}")
        try:
            beside.rename(CACHE)
        except OSError:  # another run was quicker
            shutil.rmtree(beside)
    return f"{CACHE / 'lib'}/*"


def _state(thread: Path) -> str:
    """Return a thread's state as /proc has it, `T` where it is stopped or gone."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "T"


class Broker:
    """One broker process of a cluster."""

    def __init__(self, folder: Path, node: int, port: int, controller: int, class_path: str) -> None:
        self.folder, self.node, self.port, self.controller = folder, node, port, controller
        self.advertised = port  # where others are told to come; another one puts a proxy before it
        self.class_path = class_path
        self.listeners = [f"PLAINTEXT://127.0.0.1:{port}"]  # where clients are served
        self.more = ""  # further properties
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def properties(self) -> Path:
        return self.folder / "server.properties"

    def write(self, voters: str, brokers: int) -> None:
        """Write its configuration: broker and controller in one process."""
        replicas = min(3, brokers)
        self.folder.mkdir(parents=True)
        self.properties.write_text(
            dedent(f"""\
            process.roles=broker,controller
            node.id={self.node}
            controller.quorum.voters={voters}
            listeners={",".join(self.listeners)},CONTROLLER://127.0.0.1:{self.controller}
            advertised.listeners={",".join(self.listeners).replace(f":{self.port}", f":{self.advertised}")}
            controller.listener.names=CONTROLLER
            log.dirs={self.folder / "log"}
            offsets.topic.num.partitions=1
            offsets.topic.replication.factor={replicas}
            transaction.state.log.num.partitions=1
            transaction.state.log.replication.factor={replicas}
            transaction.state.log.min.isr=1
            default.replication.factor={replicas}
            group.initial.rebalance.delay.ms=0
            group.min.session.timeout.ms=1000
            auto.create.topics.enable=false
            broker.session.timeout.ms=3000
            broker.heartbeat.interval.ms=500
            num.network.threads=2
            num.io.threads=4
            log.cleaner.dedupe.buffer.size=4000000
            """)
            + self.more
        )

    def java(self, *argv: str) -> list[str]:
        return ["java", *JAVA, *QUIET, "-cp", self.class_path, *argv]

    def format(self, cluster: str) -> None:
        argv = self.java("kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(self.properties))
        subprocess.run(argv, capture_output=True, check=True, timeout=60)

    def start(self) -> None:
        with (self.folder / "broker.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.java("kafka.Kafka", str(self.properties)), stdout=log, stderr=log, cwd=self.folder
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; SIGSTOP returns once every thread stands still, so that nothing is answered any more."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            threads = Path(f"/proc/{self.process.pid}/task")
            eventually(lambda: all(_state(each) == "T" for each in threads.iterdir()), 10, "a broker that stands still")

    def kill(self) -> None:
        """End it as a crash would; what it had not told the disk stays in the page cache, as in a real crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()  # a stopped one too; nothing of it is wanted any more
            self.process.wait(10)


class Cluster:
    """Brokers 1..n. `address` is what a client is given: all of them."""

    def __init__(self, folder: Path, brokers: int, class_path: str) -> None:
        ports = [(unused_port(), unused_port()) for _ in range(brokers)]
        self.brokers = [Broker(folder / str(n), n, *ports[n - 1], class_path) for n in range(1, brokers + 1)]

    @property
    def address(self) -> str:
        return ",".join(f"127.0.0.1:{broker.advertised}" for broker in self.brokers)

    def prepare(self) -> None:
        """Write every broker's configuration and format its disk."""
        voters = ",".join(f"{broker.node}@127.0.0.1:{broker.controller}" for broker in self.brokers)
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        for broker in self.brokers:
            broker.write(voters, len(self.brokers))
            broker.format(cluster)

    def start(self) -> None:
        """Prepare and start all brokers, and wait until they serve."""
        self.prepare()
        for broker in self.brokers:
            broker.start()
        self.wait()

    def wait(self, brokers: int | None = None) -> None:
        """Wait until so many brokers (default: all) say that they serve."""
        wanted = len(self.brokers) if brokers is None else brokers
        eventually(lambda: serving(self.address) >= wanted, 60, f"{wanted} Kafka brokers serving")

    def revive(self) -> None:
        """Let every broker run that does not, and wait until all serve."""
        for broker in self.brokers:
            assert broker.process is not None
            if broker.process.poll() is None:
                broker.signal(signal.SIGCONT)
            else:
                broker.start()
        self.wait()

    def end(self) -> None:
        for broker in self.brokers:
            broker.end()


def serving(address: str) -> int:
    """Return how many brokers of a cluster serve now."""
    client = AdminClient({"bootstrap.servers": address, "log_level": 0, "socket.timeout.ms": 2000})
    try:
        return len(client.list_topics(timeout=2).brokers)
    except KafkaException:
        return 0


@contextmanager
def cluster(folder: Path, brokers: int = 1) -> Iterator[Cluster]:
    """A cluster of our own, that may be killed; it ends with the block."""
    made = Cluster(folder, brokers, artifacts())
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="session")
def one_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A broker for the whole session."""
    with cluster(tmp_path_factory.mktemp("kafka")) as made:
        yield made


@pytest.fixture
def mortal(one_broker: Cluster) -> Iterator[Cluster]:
    """A broker of our own, to be killed and stopped; it is well again for the next test."""
    yield one_broker
    one_broker.revive()


@pytest.fixture
def kafka(request: pytest.FixtureRequest) -> str:
    """The address of a Kafka that nobody may kill."""
    given = os.environ.get(VARIABLE)
    if given is None:
        made: Cluster = request.getfixturevalue("one_broker")
        return made.address
    if not serving(given):
        impossible(f"{VARIABLE}={given} does not answer")
    return given


@pytest.fixture
def topic_prefix() -> str:
    """A prefix for this test's topics."""
    return f"t{time.time_ns():x}-"
