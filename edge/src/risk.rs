//! Failure risk of the host and of each service, with every sample.
//!
//! Each resource that has a limit is a [`Track`]: the host's memory and disk, a service's memory, open files and the file system of
//! its state. A fitted model judges a track where there is one and the track lies in its domain; otherwise the linear
//! extrapolation does. A service's risk is that of the resource which is worst off: resources fail together too often
//! for their chances to be multiplied.

use std::path::Path;
use std::sync::Arc;

use theriac_model::risk::exhaustion::{Limit, Track};
use theriac_model::risk::predictor::{ALPHA, Predictor};
use theriac_model::risk::{Abstain, Chance, Horizon, LeadTime, Risk, RiskError, RiskVersion, trend};

use crate::config::{RiskConfig, ServiceConfig};
use crate::sample::{HostReading, ServiceReading};

/// The fitted model, if there is one, and the horizons.
#[derive(Debug, Clone)]
pub struct RiskModel {
    horizons: Vec<Horizon>,
    fitted: Option<(Arc<Predictor>, RiskVersion)>,
}

impl RiskModel {
    /// What the configuration asks for.
    ///
    /// # Errors
    /// [`RiskError::Stored`] when the model's file cannot be used or its horizons or features are others.
    pub fn load(config: &RiskConfig) -> Result<Self, RiskError> {
        let linear = Self::linear(config.horizons.clone());
        let Some(path) = &config.model else {
            return Ok(linear);
        };
        let predictor = Predictor::load(path)?;
        let wanted: Vec<u64> = config.horizons.iter().map(|h| h.seconds().to_bits()).collect();
        let has: Vec<u64> = predictor.horizons().iter().map(|h| h.to_bits()).collect();
        if wanted != has || predictor.features() != trend::names() {
            return Err(RiskError::Stored {
                reason: format!(
                    "{}: its horizons ({:?} s) or features are not those of this edge",
                    path.display(),
                    predictor.horizons()
                ),
            });
        }
        let version = predictor.version();
        Ok(Self {
            fitted: Some((Arc::new(predictor), version)),
            ..linear
        })
    }

    /// The linear extrapolation alone.
    pub fn linear(horizons: Vec<Horizon>) -> Self {
        Self {
            horizons,
            fitted: None,
        }
    }

    /// The model that is used where it can be.
    pub fn version(&self) -> RiskVersion {
        self.fitted
            .as_ref()
            .map_or_else(RiskVersion::linear, |(_, version)| version.clone())
    }

    fn judge(&self, resource: &'static str, track: &Track) -> Outlook {
        let fitted = self.fitted.as_ref().and_then(|(predictor, version)| {
            let features = trend::features(&track.course()?).ok()?;
            let judged = predictor.judge(&features, ALPHA).ok()?;
            Some(Outlook {
                resource,
                chances: judged.chances.into_iter().map(Ok).collect(),
                lead: judged.lead,
                model: version.clone(),
            })
        });
        fitted.unwrap_or_else(|| self.extrapolate(resource, track))
    }

    fn extrapolate(&self, resource: &'static str, track: &Track) -> Outlook {
        let (chances, lead) = match track.extrapolate() {
            Ok(said) => (said.chances, said.lead),
            Err(abstain) => (vec![Err(abstain); self.horizons.len()], None),
        };
        Outlook {
            resource,
            chances,
            lead,
            model: RiskVersion::linear(),
        }
    }
}

/// One resource's future.
#[derive(Debug, Clone)]
pub(crate) struct Outlook {
    resource: &'static str,
    /// One for each horizon.
    chances: Vec<Result<Chance, Abstain>>,
    lead: Option<LeadTime>,
    model: RiskVersion,
}

/// The host's resources.
#[derive(Debug)]
pub(crate) struct HostRisk {
    model: RiskModel,
    memory: Track,
    disk: Track,
}

impl HostRisk {
    pub(crate) fn new(model: &RiskModel) -> Result<Self, RiskError> {
        Ok(Self {
            memory: Track::new(&model.horizons)?,
            disk: Track::new(&model.horizons)?,
            model: model.clone(),
        })
    }

    /// Takes a reading at `now_s` seconds of a clock that never stands still. Gives the host's memory, which services
    /// without a limit of their own run out of, and the host's risk.
    pub(crate) fn tick(&mut self, now_s: f64, host: &HostReading, disk_used: f64) -> (Outlook, Vec<Risk>) {
        self.memory.push(now_s, host.memory_used);
        self.disk.push(now_s, disk_used);
        let memory = self.model.judge("host_memory", &self.memory);
        let disk = self.model.judge("disk", &self.disk);
        let risks = combine(&self.model.horizons, &[&memory, &disk]);
        (memory, risks)
    }
}

/// One service's resources.
#[derive(Debug)]
pub(crate) struct ServiceRisk {
    model: RiskModel,
    memory: Option<(Limit, Track)>,
    descriptors: Track,
    state: Option<(std::path::PathBuf, Track)>,
}

impl ServiceRisk {
    pub(crate) fn new(model: &RiskModel, config: &ServiceConfig) -> Result<Self, RiskError> {
        let track = || Track::new(&model.horizons);
        let memory = config
            .memory_limit
            .map(|limit| track().map(|track| (limit, track)));
        let state = config
            .state
            .as_ref()
            .map(|state| track().map(|track| (state.dir.clone(), track)));
        Ok(Self {
            memory: memory.transpose()?,
            descriptors: track()?,
            state: state.transpose()?,
            model: model.clone(),
        })
    }

    /// The process is another one: its memory and descriptors begin anew.
    pub(crate) fn restarted(&mut self) {
        if let Some((_, track)) = &mut self.memory {
            track.restart();
        }
        self.descriptors.restart();
    }

    /// Takes a reading; `None` while the service does not run. A value that cannot be read is left out.
    pub(crate) fn tick(
        &mut self,
        now_s: f64,
        service: Option<&ServiceReading>,
        host_memory: &Outlook,
    ) -> Vec<Risk> {
        let mut outlooks = Vec::new();
        if let Some((limit, track)) = &mut self.memory {
            track.push(
                now_s,
                limit.share(service.map_or(f64::NAN, |reading| reading.memory_bytes)),
            );
            outlooks.push(self.model.judge("memory", track));
        } else {
            outlooks.push(host_memory.clone());
        }
        let descriptors = service.map_or(f64::NAN, |reading| reading.file_descriptor_share);
        self.descriptors.push(now_s, descriptors);
        outlooks.push(self.model.judge("file_descriptors", &self.descriptors));
        if let Some((dir, track)) = &mut self.state {
            track.push(now_s, space_used(dir));
            outlooks.push(self.model.judge("disk", track));
        }
        combine(&self.model.horizons, &outlooks.iter().collect::<Vec<_>>())
    }
}

/// Share of a file system in use, NaN when it cannot be read.
fn space_used(path: &Path) -> f64 {
    rustix::fs::statvfs(path).map_or(f64::NAN, |space| {
        let used = space.f_blocks.saturating_sub(space.f_bavail);
        if space.f_blocks == 0 {
            f64::NAN
        } else {
            used as f64 / space.f_blocks as f64
        }
    })
}

/// For each horizon the resource that is worst off; abstains where every resource does.
fn combine(horizons: &[Horizon], outlooks: &[&Outlook]) -> Vec<Risk> {
    let at_horizon = |(at, horizon): (usize, &Horizon)| {
        let known = outlooks
            .iter()
            .filter_map(|outlook| Some((*outlook, outlook.chances.get(at)?.ok()?)));
        let worst = known
            .clone()
            .max_by(|a, b| a.1.probability.total_cmp(&b.1.probability));
        let Some((outlook, chance)) = worst else {
            return Risk {
                horizon: *horizon,
                chance: Err(why_none(outlooks, at)),
                lead: None,
                resource: None,
                model: RiskVersion::linear(),
            };
        };
        let most = |bound: fn(&Chance) -> f64| known.clone().map(|(_, c)| bound(&c)).fold(0.0, f64::max);
        Risk {
            horizon: *horizon,
            chance: Ok(Chance::new(
                chance.probability,
                most(|chance| chance.low),
                most(|chance| chance.high),
            )),
            // Its own, not the earliest of all: people read both as one.
            lead: outlook.lead,
            resource: Some(outlook.resource),
            model: outlook.model.clone(),
        }
    };
    horizons.iter().enumerate().map(at_horizon).collect()
}

/// A resource that only needs time says more than one that cannot be read.
fn why_none(outlooks: &[&Outlook], at: usize) -> Abstain {
    let reasons = outlooks
        .iter()
        .filter_map(|outlook| outlook.chances.get(at)?.err());
    reasons
        .min_by_key(|reason| *reason != Abstain::TooShort)
        .unwrap_or(Abstain::NoLimit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outlook(resource: &'static str, probability: Result<f64, Abstain>) -> Outlook {
        Outlook {
            resource,
            chances: vec![probability.map(|p| Chance::new(p, p / 2.0, p * 1.5))],
            lead: None,
            model: RiskVersion::linear(),
        }
    }

    fn horizons() -> Vec<Horizon> {
        vec![Horizon::DEFAULT[0]]
    }

    #[test]
    fn the_worst_resource_is_the_risk() {
        let (memory, disk) = (outlook("memory", Ok(0.2)), outlook("disk", Ok(0.6)));
        let risk = combine(&horizons(), &[&memory, &disk]).remove(0);
        assert_eq!(risk.resource, Some("disk"));
        assert!((risk.chance.unwrap().probability - 0.6).abs() < 1e-12);
        let unread = outlook("disk", Err(Abstain::Missing));
        let risk = combine(&horizons(), &[&memory, &unread]).remove(0);
        assert_eq!(risk.resource, Some("memory"));
    }

    #[test]
    fn nothing_known_abstains_and_says_why() {
        let reason = |outlooks: &[&Outlook]| combine(&horizons(), outlooks).remove(0).chance.unwrap_err();
        assert_eq!(reason(&[]), Abstain::NoLimit);
        let (missing, short) = (
            outlook("memory", Err(Abstain::Missing)),
            outlook("disk", Err(Abstain::TooShort)),
        );
        assert_eq!(reason(&[&missing]), Abstain::Missing);
        assert_eq!(reason(&[&missing, &short]), Abstain::TooShort);
    }

    fn host(memory_used: f64) -> HostReading {
        HostReading {
            cpu_used: 0.1,
            load_per_core: 0.1,
            memory_used,
            swap_used: 0.0,
            disk_read: 0.0,
            disk_write: 0.0,
            network_receive: 0.0,
            network_send: 0.0,
        }
    }

    #[test]
    fn a_host_whose_memory_fills_is_at_risk_before_it_is_full() {
        let mut risk = HostRisk::new(&RiskModel::linear(Horizon::DEFAULT.to_vec())).unwrap();
        let mut risks = Vec::new();
        for second in 0..700 {
            let used = 0.1 + f64::from(second) / 1000.0;
            risks = risk.tick(f64::from(second), &host(used), 0.3).1;
        }
        // 0.201 are left at 0.001 a second.
        assert!(risks[0].chance.unwrap().probability < 0.1);
        assert!(risks[1].chance.unwrap().probability > 0.9);
        assert_eq!(risks[1].resource, Some("host_memory"));
        let lead = risks[1].lead.unwrap();
        assert!(
            (lead.expected - 201.0).abs() < 2.0 && lead.covers(202.0),
            "{lead:?}"
        );
    }

    #[test]
    fn a_service_without_a_limit_has_the_hosts_memory_and_one_that_stands_still_abstains() {
        let model = RiskModel::linear(horizons());
        let config = crate::config::EdgeConfig::load(None, []).unwrap();
        assert!(config.services.is_empty() && config.risk.horizons.len() == 3);
        let mut risk = ServiceRisk {
            memory: None,
            descriptors: Track::new(&model.horizons).unwrap(),
            state: None,
            model,
        };
        let host_memory = outlook("host_memory", Ok(0.7));
        assert_eq!(
            risk.tick(0.0, None, &host_memory)[0].resource,
            Some("host_memory")
        );
        let unknown = outlook("host_memory", Err(Abstain::Missing));
        assert_eq!(risk.tick(1.0, None, &unknown)[0].chance, Err(Abstain::Missing));
    }

    #[test]
    fn a_model_that_cannot_be_used_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.json");
        std::fs::write(&path, "{}").unwrap();
        let config = RiskConfig {
            horizons: horizons(),
            model: Some(path),
        };
        assert!(matches!(RiskModel::load(&config), Err(RiskError::Stored { .. })));
    }
}
