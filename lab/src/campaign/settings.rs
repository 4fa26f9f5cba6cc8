//! The edge's own configuration for a ward, and what the ablations lack.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use theriac_edge::config as edge;
use theriac_edge::postgres::{CheckpointKind, CheckpointSettings, SessionSettings};
use theriac_heal::policy::{Autonomy, HealingSection, NodeBudget};

use super::Healer;
use super::fault::Lane;
use super::ward::{MEMORY_MAX_MIB, Ward, text};
use crate::fleet::place::SAMPLING;

/// Name of the service that is broken.
pub(super) const SERVICE: &str = "ward";
/// Name of the one that it asks.
pub(super) const UPSTREAM: &str = "upstream";
/// Samples before the first model.
const WARM_UP_ROWS: usize = 120;
/// The most that there is: seven hours at this rate.
const NEVER: usize = 100_000;
/// Actions are no scarce thing where faults are injected.
const ACTIONS_MAX: u32 = 1_000;

/// Writes `edge.toml` into the ward's folder.
///
/// *Without prediction* its detector never has a model, it knows no memory limit, slots count as too few when the last one is
/// taken, and a disk as full when its last block is. *Without diagnosis* it is given nothing to look into: no sessions, no
/// room, no output, no dependency and no model. It sees whether the process lives and answers, and what the kernel tells of its threads,
/// descriptors and TCP, which has no switch: of a slow disk and of lost packets it knows what the whole edge does.
pub(super) fn write(ward: &Ward, healer: Healer) -> io::Result<PathBuf> {
    let blind = healer == Healer::WithoutDiagnosis;
    let foresees = healer.foresees();
    let mut services = vec![service(ward, healer)];
    if ward.lane == Lane::Http && !blind {
        services.push(upstream(ward));
    }
    let settings = edge::EdgeSettings {
        node: Some(healer.name().replace('_', "-")),
        state_dir: Some(ward.dir.join("edge")),
        offsite: None,
        sampling: edge::SamplingSettings {
            interval: SAMPLING,
            history_rows: if foresees { 2_400 } else { NEVER },
            ..edge::SamplingSettings::default()
        },
        detection: edge::DetectionSettings {
            warm_up_rows: if foresees { WARM_UP_ROWS } else { NEVER },
            half_lives: [Duration::from_millis(750), Duration::from_secs(3)],
            false_alarms_per_day: 1.0,
            ..edge::DetectionSettings::default()
        },
        risk: edge::RiskSettings::default(),
        federation: edge::FederationSettings::default(),
        http: edge::HttpSettings { listen: ward.page },
        healing: HealingSection {
            autonomy: Some(Autonomy::Act),
            restore_autonomy: Some(Autonomy::Act),
            cooldown: Some(Duration::from_secs(1)),
            max_actions: Some(ACTIONS_MAX),
            settle: Some(Duration::from_secs(5)),
            anomaly_lasting: Some(Duration::from_millis(1_500)),
            // Faults are injected here, so that they return is expected.
            anomaly_restarts: Some(ACTIONS_MAX),
            verify_probes: Some(2),
            ..HealingSection::default()
        },
        healing_policy: edge::HealingPolicySettings::default(),
        healing_budget: NodeBudget {
            max_actions: ACTIONS_MAX,
            ..NodeBudget::default()
        },
        service: services,
    };
    let path = ward.dir.join("edge.toml");
    std::fs::write(&path, toml::to_string(&settings).map_err(io::Error::other)?)?;
    Ok(path)
}

fn service(ward: &Ward, healer: Healer) -> edge::ServiceSettings {
    let blind = healer == Healer::WithoutDiagnosis;
    let server = ward.postgres.as_ref().filter(|_| !blind);
    let check = |argv: [&str; 4]| -> Vec<String> {
        std::iter::once(text(&ward.program))
            .chain(argv.map(str::to_owned))
            .collect()
    };
    edge::ServiceSettings {
        argv: if blind {
            ward.argv_as_owner()
        } else {
            ward.argv(true)
        },
        output: (!blind).then(|| ward.dir.join("service.log")),
        state: (!blind).then(|| edge::StateSettings {
            dir: ward.state(),
            check: match ward.lane {
                Lane::Http => check(["service", "check", "--state", "{state}"]),
                Lane::Postgres | Lane::Redis => Vec::new(),
            },
            check_timeout: Duration::from_secs(10),
            interval: Duration::from_mins(5),
            min_gap: Duration::from_mins(1),
            budget_pct: 5.0,
            expected_mtbf: Duration::from_hours(24),
            verify_every: Duration::from_hours(24),
            keep: 2,
            free_bytes_min: (healer == Healer::WithoutPrediction).then_some(0),
        }),
        checkpoint: (!blind).then(|| checkpoint(ward)).flatten(),
        sessions: server.map(|_| SessionSettings {
            look_every: Duration::from_millis(500),
            waited_min: Duration::from_secs(1),
            idle_min: Duration::from_secs(1),
            free_min: if healer == Healer::WithoutPrediction { 1 } else { 8 },
            free_after: 20,
            ..SessionSettings::default()
        }),
        space: (!blind && ward.lane != Lane::Redis).then(|| edge::SpaceSettings {
            relieve: vec![ward.cache()],
            quarantine: ward.quarantine(),
            min_age: Duration::ZERO,
        }),
        depends_on: if ward.lane == Lane::Http && !blind {
            vec![UPSTREAM.to_owned()]
        } else {
            Vec::new()
        },
        limits: edge::LimitSettings {
            memory_bytes: (ward.lane == Lane::Http && healer.foresees()).then_some(MEMORY_MAX_MIB << 20),
        },
        proxy: ward
            .front
            .map(|listen| edge::ProxySettings::between(listen, ward.service)),
        ..plain(SERVICE, &ward.probe_url())
    }
}

fn checkpoint(ward: &Ward) -> Option<CheckpointSettings> {
    let of_server = CheckpointSettings {
        // Beside the quarantine, not on the small file system of the data.
        work_dir: Some(ward.dir.join("shadow")),
        ..CheckpointSettings::default()
    };
    match ward.lane {
        Lane::Http => None,
        Lane::Redis => Some(CheckpointSettings {
            kind: CheckpointKind::Redis,
            address: ward.service.to_string(),
            ..of_server
        }),
        Lane::Postgres => ward.postgres.as_ref().map(|server| CheckpointSettings {
            kind: CheckpointKind::Postgresql,
            socket_dir: server.target.socket_dir.clone(),
            user: Some(server.target.user.clone()),
            requests: 20,
            ..of_server
        }),
    }
}

/// Somebody else's service, watched and never touched.
fn upstream(ward: &Ward) -> edge::ServiceSettings {
    edge::ServiceSettings {
        argv: ward.upstream_argv(),
        healing: HealingSection {
            autonomy: Some(Autonomy::Observe),
            ..HealingSection::default()
        },
        ..plain(UPSTREAM, &format!("http://{}/healthz", ward.upstream))
    }
}

fn plain(name: &str, url: &str) -> edge::ServiceSettings {
    edge::ServiceSettings {
        name: name.to_owned(),
        argv: Vec::new(),
        env: std::collections::BTreeMap::new(),
        cwd: None,
        stop_grace: Duration::from_secs(2),
        keep_running: false,
        output: None,
        probe: Some(edge::ProbeSettings {
            url: url.to_owned(),
            interval: Duration::from_millis(250),
            timeout: Duration::from_secs(1),
            start_grace: Duration::from_secs(20),
            password_file: None,
            loading_max: Duration::from_mins(10),
        }),
        state: None,
        checkpoint: None,
        sessions: None,
        space: None,
        hook: None,
        webhook: None,
        proxy: None,
        cgroup: None,
        systemd: None,
        kubernetes: None,
        depends_on: Vec::new(),
        limits: edge::LimitSettings { memory_bytes: None },
        healing: HealingSection::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::ward::Postgres;
    use theriac_heal::postgres::binaries::PgBinaries;
    use theriac_heal::postgres::owner::Owner;
    use theriac_heal::postgres::session::Target;

    fn ward(dir: &std::path::Path, lane: Lane) -> Ward {
        let addresses = crate::fleet::free_addresses(4).unwrap();
        let mut ward = Ward {
            lane,
            dir: dir.to_owned(),
            disk: dir.join("disk"),
            program: "/bin/true".into(),
            page: addresses[0],
            service: addresses[1],
            control: addresses[2],
            upstream: addresses[3],
            front: None,
            postgres: None,
            redis: "/bin/redis-server".into(),
        };
        std::fs::create_dir_all(ward.state()).unwrap();
        if lane == Lane::Postgres {
            let binaries = PgBinaries::find_here().unwrap_or_else(|missing| panic!("{missing}"));
            ward.postgres = Some(Postgres {
                binaries,
                owner: Owner {
                    uid: 65_534,
                    gid: 65_534,
                },
                target: Target {
                    socket_dir: dir.join("s"),
                    port: 5432,
                    user: "postgres".to_owned(),
                    database: "postgres".to_owned(),
                },
            });
        }
        ward
    }

    #[test]
    fn an_edge_takes_what_was_written_for_it_and_an_ablation_lacks_what_its_name_says() {
        for lane in Lane::ALL {
            for healer in [
                Healer::Theriac,
                Healer::TheriacDirect,
                Healer::WithoutPrediction,
                Healer::WithoutDiagnosis,
            ] {
                let dir = tempfile::tempdir().unwrap();
                let mut ward = ward(dir.path(), lane);
                if lane == Lane::Http && healer.has_proxy() {
                    ward.front = crate::fleet::free_addresses(1).unwrap().pop();
                }
                let path = write(&ward, healer).unwrap();
                let config = edge::EdgeConfig::load(Some(&path), []).unwrap();
                let of = &config.services[0];
                assert_eq!(of.name.as_str(), SERVICE);
                assert_eq!(of.healing.autonomy, Autonomy::Act, "{lane:?} {healer:?}");
                let foresees = healer.foresees();
                assert_eq!(
                    config.detection.warm_up_rows == WARM_UP_ROWS,
                    foresees,
                    "{lane:?} {healer:?}"
                );
                assert_eq!(of.memory_limit.is_some(), foresees && lane == Lane::Http);
                let looks = healer != Healer::WithoutDiagnosis;
                assert_eq!(
                    of.proxy.is_some(),
                    lane == Lane::Http && healer != Healer::TheriacDirect,
                    "{lane:?} {healer:?}"
                );
                let last_block = of.state.as_ref().and_then(|state| state.free_bytes_min) == Some(0);
                assert_eq!(
                    last_block,
                    healer == Healer::WithoutPrediction,
                    "{lane:?} {healer:?}"
                );
                assert_eq!(
                    of.space.is_some(),
                    looks && lane != Lane::Redis,
                    "{lane:?} {healer:?}"
                );
                assert_eq!(of.sessions.is_some(), looks && lane == Lane::Postgres);
                assert_eq!(of.depends_on.is_empty(), !(looks && lane == Lane::Http));
            }
        }
    }
}
