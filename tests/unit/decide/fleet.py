"""A cloud in numbers, for trials of placement over time: what arrives, what runs and for how long, all from one seed.

Whatever is placed runs for its span of turns from then on. The plan is the product's own; nothing else of it is here.
"""

import random
from dataclasses import dataclass, field

import msgspec

from covey import model
from covey.decide import placement, rooms
from tests.support import nouns

AGE_TURNS = 600  # a span of waiting, in turns


@dataclass
class Job:
    instance: model.Instance
    birth: int  # a revision
    came: int  # a turn
    span: int
    placed: int = 0  # a turn
    changed: int = 0  # a turn


@dataclass
class Fleet:
    """`nodes`: name → (capacity mode, slots, processors)."""

    chance: random.Random
    nodes: dict[str, tuple[model.CapacityMode, int, int]]
    reserves: bool = True
    now: int = 1
    revision: int = 1
    jobs: dict[model.InstanceId, Job] = field(default_factory=dict)
    waiting: dict[model.InstanceId, Job] = field(default_factory=dict)
    running: dict[str, list[Job]] = field(default_factory=dict)
    used: int = 0  # processors × turns

    def __post_init__(self) -> None:
        self.running = {id: [] for id in self.nodes}

    def arrives(self, vcpu: int, span: int, **spec: object) -> Job:
        id = model.InstanceId(f"i{len(self.jobs):06}")
        wanted = nouns.spec(vcpu=vcpu, vram_mb=vcpu * 1024, **spec)
        self.revision += 1
        one = nouns.instance(id=id, spec=wanted, created_ns=self.revision)
        job = Job(one, self.revision, self.now, span, changed=self.now)
        self.jobs[id] = self.waiting[id] = job
        return job

    def cloud(self) -> placement.Cloud:
        return placement.Cloud([self.host(id) for id in self.nodes], self._birth)

    def host(self, id: str) -> rooms.Host:
        mode, slots, vcpu = self.nodes[id]
        claims = tuple(
            model.Claim(instance=job.instance.id, epoch=1, vcpu=job.instance.spec.vcpu, vram_mb=1)
            for job in self.running[id]
        )
        return nouns.host(id, slots=slots, claims=claims, cpu_count=vcpu, ram_mb=1 << 20, capacity_mode=mode)

    def _birth(self, id: model.InstanceId) -> int:
        return self.jobs[id].birth

    def turn(self) -> list[placement.Place | placement.Wait]:
        """End what is over, let the waiting grow older, place. Answers with the plan."""
        self.now += 1
        self.revision += 1
        for id, jobs in self.running.items():
            self.running[id] = [job for job in jobs if job.placed + job.span > self.now]
        for job in self.waiting.values():
            if self.now - job.changed >= AGE_TURNS:
                job.instance = placement.older(job.instance, self.revision)
                job.changed = self.now
        plan = self.plan()
        for decision in plan:
            if isinstance(decision, placement.Place):
                job = self.waiting.pop(decision.instance)
                job.placed = self.now
                self.running[decision.node].append(job)
        self.used += sum(job.instance.spec.vcpu for jobs in self.running.values() for job in jobs)
        return plan

    def plan(self) -> list[placement.Place | placement.Wait]:
        cloud, jobs = self.cloud(), list(self.waiting.values())
        if self.reserves:
            return placement.plan([job.instance for job in jobs], cloud)
        aged_from = {"aged_from": 1 << 60}  # nothing was created after that: no reservation is ever made
        return placement.plan([msgspec.structs.replace(job.instance, **aged_from) for job in jobs], cloud)

    def waited(self, job: Job) -> int:
        return (job.placed or self.now) - job.came
