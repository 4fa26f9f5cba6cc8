//! A decaying average of each site's updates: noise shrinks, what the site keeps saying stays.

use std::collections::BTreeMap;

use theriac_protocol::units::NodeId;

/// A decay out of its range.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("a decay of {0} is outside 0 (included) to 1 (excluded): 0.9 remembers about ten rounds")]
pub struct DecayError(pub f64);

/// m ← b·m + (1 − b)·u for each site, m = u at first. Post-processing of noised releases: it costs no privacy.
///
/// Independent noise shrinks by √((1 − b)/(1 + b)) in the long run, 4.4 times at b = 0.9. Memory: n·d values of `f32`.
#[derive(Debug, Clone)]
pub struct SiteAverages {
    decay: f64,
    averages: BTreeMap<NodeId, Vec<f32>>,
}

impl SiteAverages {
    /// With decay b, 0 to 1: 0 forgets at once.
    ///
    /// # Errors
    /// [`DecayError`].
    pub fn new(decay: f64) -> Result<Self, DecayError> {
        if (0.0..1.0).contains(&decay) {
            Ok(Self {
                decay,
                averages: BTreeMap::new(),
            })
        } else {
            Err(DecayError(decay))
        }
    }

    /// Takes a site's update and gives its average, both `[d]`. An update of another length begins anew: the model has changed.
    pub fn take(&mut self, site: &NodeId, update: &[f32]) -> &[f32] {
        let decay = self.decay;
        let average = self.averages.entry(site.clone()).or_default();
        if average.len() == update.len() {
            for (mean, value) in average.iter_mut().zip(update) {
                #[expect(clippy::cast_possible_truncation, reason = "the sum is rounded once, here")]
                let next = (decay * f64::from(*mean) + (1.0 - decay) * f64::from(*value)) as f32;
                *mean = next;
            }
        } else {
            average.clear();
            average.extend_from_slice(update);
        }
        average
    }

    /// Forgets a site: it left, or its past no longer counts.
    pub fn forget(&mut self, site: &NodeId) {
        self.averages.remove(site);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    #[test]
    fn an_average_decays_towards_what_a_site_says() {
        let mut averages = SiteAverages::new(0.9).unwrap();
        assert_eq!(averages.take(&site("a"), &[1.0, -2.0]), [1.0, -2.0]);
        let next = averages.take(&site("a"), &[2.0, -2.0]).to_vec();
        assert!(
            (next[0] - 1.1).abs() < 1e-6 && (next[1] + 2.0).abs() < 1e-6,
            "{next:?}"
        );
        assert_eq!(averages.take(&site("b"), &[7.0, 7.0]), [7.0, 7.0]);
    }

    #[test]
    fn another_length_or_a_forgotten_site_begins_anew() {
        let mut averages = SiteAverages::new(0.5).unwrap();
        averages.take(&site("a"), &[1.0]);
        assert_eq!(averages.take(&site("a"), &[3.0, 3.0]), [3.0, 3.0]);
        averages.forget(&site("a"));
        assert_eq!(averages.take(&site("a"), &[9.0, 9.0]), [9.0, 9.0]);
    }

    #[test]
    fn independent_noise_shrinks_as_it_should() {
        let mut averages = SiteAverages::new(0.9).unwrap();
        let mut state = 5_u64;
        let mut sum = 0.0;
        for round in 0..400 {
            let noise: Vec<f32> = (0..200)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    (state >> 40) as f32 / f32::from(1_u16 << 12) / 4096.0 * 3.464_1 - 1.732_05
                })
                .collect();
            let mean = averages.take(&site("a"), &noise);
            if round >= 100 {
                sum += mean.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 200.0;
            }
        }
        let shrunk = (sum / 300.0).sqrt();
        assert!((shrunk - (0.1_f64 / 1.9).sqrt()).abs() < 0.01, "{shrunk}");
    }

    #[test]
    fn refuses_a_decay_that_never_forgets() {
        for decay in [1.0, -0.1, f64::NAN, 2.0] {
            assert!(SiteAverages::new(decay).is_err(), "{decay}");
        }
    }
}
