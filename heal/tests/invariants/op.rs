//! What can happen to a node, and how it is set up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use theriac_heal::policy::fleet::FleetBudget;
use theriac_heal::policy::{ActionRule, Approvals, Autonomy, HealPolicy, RiskClass};
use theriac_heal::types::{ActionKind, FaultClass};

pub(crate) const SERVICES: [&str; 2] = ["a", "b"];

/// What the policy lets the node do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Setting {
    /// Everything, without a policy file.
    Act,
    /// Everything, hooks and webhooks before it.
    Hooked,
    /// Nothing without a person at the host.
    Recommend,
    /// Nothing at all.
    Observe,
    /// Everything, and before it what is configured beside the process: bounds, units, deployments, a drain.
    Configured,
    /// A file: restarts want two signatures, restores are R4, starts and sessions are the node's own.
    Signed,
    /// A file with budgets of the fleet: everything is the node's own.
    Fleet,
    /// The same, and a restart needs a slot.
    Shared,
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Probe {
        service: usize,
        ok: bool,
    },
    Exit {
        service: usize,
    },
    Started {
        service: usize,
    },
    Process {
        service: usize,
        stopped: bool,
    },
    Anomaly {
        service: usize,
        channel: usize,
        score: f32,
    },
    Suspicion {
        service: usize,
        channel: usize,
    },
    Cleared {
        service: usize,
    },
    State {
        service: usize,
        good: bool,
    },
    Disk {
        service: usize,
        full: bool,
    },
    ReadOnly {
        service: usize,
        on: bool,
    },
    /// Two looks at a server's sessions, alike.
    Sessions {
        service: usize,
        piled: bool,
        running: bool,
        full: bool,
        /// Which session is the root; 9 is at its commit, 10 waits for a standby.
        pid: i32,
    },
    /// Nobody was let in to look, an ordinary client was refused, or the server refuses for a reason of its own.
    Refused {
        service: usize,
        how: usize,
    },
    /// Why its threads do not run, or its answers do not come: nothing, overload, others on the processors, a slow disk, open files, itself,
    /// lost packets.
    Pressure {
        service: usize,
        why: usize,
    },
    Pass {
        ms: u64,
    },
    /// Time passes and nobody looks, as when the host was asleep.
    Sleep {
        ms: u64,
    },
    /// The oldest intent that waits for storage is stored, or cannot be.
    Record {
        stored: bool,
    },
    /// The oldest executor ends.
    Execute {
        outcome: usize,
    },
    /// From here on only intents are stored, or everything again.
    Stall(bool),
    /// The node dies; what was not stored is forgotten.
    Die {
        new_boot: bool,
        took_effect: bool,
    },
    Approve {
        incident: u64,
        word: Word,
    },
    /// Two people sign the plan as it stands.
    Agree {
        incident: u64,
    },
    /// Hangs from their beginning to the end of their first action, which fails; then it is well again. Far apart they meet a breaker that is
    /// half open.
    Failure {
        service: usize,
        times: usize,
        apart_ms: u64,
    },
    /// Where a restart needs a slot: a hang under one that is lent for so long, while the record takes so long and nobody looks; or with none until a person is asked and approves.
    Lent {
        service: usize,
        ms: u64,
        late_ms: u64,
        never: bool,
    },
    Deny {
        incident: u64,
    },
    Reinstate {
        service: usize,
        stale: bool,
    },
    /// The aggregator says how the fleet is: sick, busy, well, or what cannot be.
    Report {
        nodes: u32,
        unhealthy: u32,
        acting: u32,
    },
    /// The aggregator lends a slot for so long, wanted or not.
    Slot {
        ms: u64,
    },
    Halt(bool),
    Wall {
        back: bool,
    },
}

/// What an approval is of, and whose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Word {
    pub(crate) plan: Of,
    /// `None` for somebody at the host.
    pub(crate) by: Option<usize>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Of {
    /// The plan as it stands, where there is one.
    Present,
    /// One that stood before.
    Former,
    /// None.
    Nothing,
}

pub(crate) fn setting() -> impl Strategy<Value = Setting> {
    prop_oneof![
        3 => Just(Setting::Act),
        2 => Just(Setting::Hooked),
        2 => Just(Setting::Configured),
        2 => Just(Setting::Recommend),
        1 => Just(Setting::Observe),
        2 => Just(Setting::Signed),
        2 => Just(Setting::Fleet),
        2 => Just(Setting::Shared),
    ]
}

fn report() -> impl Strategy<Value = Op> {
    let counts = prop_oneof![
        3 => Just((20, 9, 0)),
        2 => Just((20, 0, 0)),
        1 => Just((20, 1, 4)),
        1 => Just((2, 1, 0)),
        1 => Just((3, 2, 0)),
        1 => Just((0, 0, 0)),
        1 => Just((u32::MAX, u32::MAX, u32::MAX)),
        1 => Just((20, u32::MAX, 0)),
        1 => any::<(u32, u32, u32)>(),
    ];
    counts.prop_map(|(nodes, unhealthy, acting)| Op::Report {
        nodes,
        unhealthy,
        acting,
    })
}

fn word() -> impl Strategy<Value = Word> {
    let plan = prop_oneof![4 => Just(Of::Present), 1 => Just(Of::Former), 1 => Just(Of::Nothing)];
    (
        plan,
        prop_oneof![1 => Just(None), 2 => (0..3_usize).prop_map(Some)],
    )
        .prop_map(|(plan, by)| Word { plan, by })
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    let service = 0..SERVICES.len();
    let seen = prop_oneof![
        4 => (service.clone(), any::<bool>()).prop_map(|(service, ok)| Op::Probe { service, ok }),
        3 => service.clone().prop_map(|service| Op::Exit { service }),
        1 => service.clone().prop_map(|service| Op::Started { service }),
        1 => (service.clone(), any::<bool>()).prop_map(|(service, stopped)| Op::Process { service, stopped }),
        // Three of a kind with a probe before: trouble that the detector finds while the service still answers.
        2 => (service.clone(), 0..4_usize).prop_map(|(service, channel)| Op::Suspicion { service, channel }),
        2 => (service.clone(), 0..4_usize, prop_oneof![Just(9.0_f32), Just(f32::NAN), Just(f32::INFINITY)])
            .prop_map(|(service, channel, score)| Op::Anomaly { service, channel, score }),
        1 => service.clone().prop_map(|service| Op::Cleared { service }),
        1 => (service.clone(), any::<bool>()).prop_map(|(service, good)| Op::State { service, good }),
        2 => (service.clone(), any::<bool>(), any::<bool>(), any::<bool>(), 7..11_i32)
            .prop_map(|(service, piled, running, full, pid)| Op::Sessions { service, piled, running, full, pid }),
        1 => (service.clone(), 0..3_usize).prop_map(|(service, how)| Op::Refused { service, how }),
        1 => (service.clone(), prop::bool::weighted(0.3)).prop_map(|(service, on)| Op::ReadOnly { service, on }),
        1 => (service.clone(), 0..7_usize).prop_map(|(service, why)| Op::Pressure { service, why }),
        1 => (service.clone(), any::<bool>()).prop_map(|(service, full)| Op::Disk { service, full }),
    ];
    prop_oneof![
        20 => seen,
        4 => prop_oneof![1..2_000_u64, 1_000..60_000_u64, 100_000..2_000_000_u64].prop_map(|ms| Op::Pass { ms }),
        1 => (1_000..2_000_000_u64).prop_map(|ms| Op::Sleep { ms }),
        6 => prop::bool::weighted(0.9).prop_map(|stored| Op::Record { stored }),
        6 => (0..7_usize).prop_map(|outcome| Op::Execute { outcome }),
        2 => (any::<bool>(), any::<bool>())
            .prop_map(|(new_boot, took_effect)| Op::Die { new_boot, took_effect }),
        1 => any::<bool>().prop_map(Op::Stall),
        3 => (1..6_u64, word()).prop_map(|(incident, word)| Op::Approve { incident, word }),
        2 => (1..6_u64).prop_map(|incident| Op::Agree { incident }),
        1 => (1..8_u64).prop_map(|incident| Op::Deny { incident }),
        3 => (service.clone(), 1..5_usize, prop_oneof![Just(6_000_u64), Just(310_000)])
            .prop_map(|(service, times, apart_ms)| Op::Failure { service, times, apart_ms }),
        2 => (service.clone(), 151_000..400_000_u64, 0..400_000_u64, prop::bool::weighted(0.3))
            .prop_map(|(service, ms, late_ms, never)| Op::Lent { service, ms, late_ms, never }),
        1 => (service, any::<bool>()).prop_map(|(service, stale)| Op::Reinstate { service, stale }),
        4 => report(),
        2 => prop_oneof![1_000..149_000_u64, 151_000..400_000_u64, Just(u64::MAX / 4)]
            .prop_map(|ms| Op::Slot { ms }),
        1 => prop::bool::weighted(0.3).prop_map(Op::Halt),
        1 => any::<bool>().prop_map(|back| Op::Wall { back }),
    ]
}

impl Setting {
    pub(crate) fn policy(self) -> HealPolicy {
        let mut policy = HealPolicy {
            autonomy: match self {
                Self::Recommend => Autonomy::Recommend,
                Self::Observe => Autonomy::Observe,
                Self::Act | Self::Hooked | Self::Configured | Self::Signed | Self::Fleet | Self::Shared => {
                    Autonomy::Act
                }
            },
            // Both are met: with a standing approval of restores, and without.
            restore_autonomy: match self {
                Self::Act | Self::Configured => Autonomy::Act,
                _ => HealPolicy::default().restore_autonomy,
            },
            max_actions: if matches!(self, Self::Hooked | Self::Configured) {
                12
            } else {
                4
            },
            window: Duration::from_mins(10),
            cooldown: Duration::from_secs(5),
            settle: Duration::from_secs(2),
            anomaly_lasting: Duration::ZERO,
            ..HealPolicy::default()
        };
        if self == Self::Hooked {
            policy.hook_for = BTreeSet::from([FaultClass::Hang, FaultClass::Overload]);
            policy.webhook_for = BTreeSet::from([FaultClass::Hang, FaultClass::Unknown]);
        }
        if self == Self::Configured {
            use ActionKind as A;
            policy.configured = BTreeMap::from([
                (
                    FaultClass::Hang,
                    vec![A::ThrottleCpu, A::RestartUnit, A::RolloutRestart],
                ),
                (FaultClass::MemoryLeak, vec![A::LimitMemory, A::ReloadUnit]),
                (FaultClass::Overload, vec![A::Drain, A::ScaleUp]),
                (FaultClass::CpuContention, vec![A::Freeze, A::ResetFailedUnit]),
                (FaultClass::Unknown, vec![A::RolloutUndo]),
            ]);
        }
        if self == Self::Signed {
            policy.rules = Some(rules());
        }
        if matches!(self, Self::Fleet | Self::Shared) {
            let mut rules: BTreeMap<_, _> = ActionKind::ALL
                .into_iter()
                .map(|action| (action, rule(action)))
                .collect();
            if let Some(restart) = rules.get_mut(&ActionKind::Restart) {
                restart.shared = self == Self::Shared;
            }
            policy.rules = Some(rules);
            policy.fleet = Some(FleetBudget {
                hold_max: HOLD_MAX,
                ..FleetBudget::default()
            });
        }
        policy
    }
}

/// The longest hold in these histories.
pub(crate) const HOLD_MAX: Duration = Duration::from_mins(2);

fn rule(action: ActionKind) -> ActionRule {
    ActionRule {
        class: RiskClass::of(action),
        autonomy: Autonomy::Act,
        cooldown: None,
        max: None,
        inhibit: BTreeSet::new(),
        when: None,
        approvals: None,
        evidence: false,
        shared: false,
    }
}

fn rules() -> BTreeMap<ActionKind, ActionRule> {
    let mut rules: BTreeMap<_, _> = ActionKind::ALL
        .into_iter()
        .map(|action| (action, rule(action)))
        .collect();
    // Windows of their own, longer than any other: what was done counts for as long.
    rules.insert(
        ActionKind::Start,
        ActionRule {
            max: Some((2, Duration::from_mins(50))),
            cooldown: Some(Duration::from_mins(25)),
            ..rule(ActionKind::Start)
        },
    );
    let restart = rule(ActionKind::Restart);
    rules.insert(
        ActionKind::Restart,
        ActionRule {
            autonomy: Autonomy::Recommend,
            approvals: Some(Approvals {
                need: 2,
                ttl: Duration::from_mins(3),
                signed: true,
            }),
            ..restart
        },
    );
    let restore = rule(ActionKind::RestoreAndStart);
    rules.insert(
        ActionKind::RestoreAndStart,
        ActionRule {
            class: RiskClass::R4,
            autonomy: Autonomy::Recommend,
            ..restore
        },
    );
    rules
}
