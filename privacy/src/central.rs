//! Noise at the centre: a whole site as the unit, for large fleets that trust their aggregator.
//!
//! **Unit** everything that one site contributes to one sum. **Adjacency** add or remove one site; that a site is *there* is not hidden (its connection shows it), what
//! it sent is. **Mechanism** before a round's updates are added up, each of them throws a secret coin of probability q ([`crate::poisson`]); those that came are
//! clipped to norm C on the public grid ([`crate::clip`]), added, and the exact discrete Gaussian of standard deviation σC is added to the sum, which
//! is divided by the **expected** number qN of updates, N a public number: never by the number that came. **Sensitivity** C. **Guarantee** the
//! Poisson-subsampled Gaussian, charged to every site, drawn or not, before the sum is read.
//!
//! The coins are thrown after the updates are there, and nobody is told how they fell: who watches the network sees who sent something, not whose
//! update counted. So the amplification by sampling holds against everybody but the centre itself.
//!
//! **Trust.** Here the centre sees each update before this noise is on it, so it must be trusted with them. It is no replacement for a site's own noise: an edge
//! has none to switch off.

use std::path::Path;

use serde::Serialize;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Epsilon, L2Norm, NodeId, NoiseMultiplier, Round, Timestamp};

use crate::accountant::SamplingRate;
use crate::clip::GridSum;
use crate::ledger::{
    Charge, KnownHead, Ledger, LedgerError, ReleasePlan, Reservation, ReserveError, Reserved, State,
};
use crate::noise::{NoiseError, NoiseMechanism, release};
use crate::poisson::PoissonSampler;
use crate::policy::{Policy, PolicyError};

/// What a centre promises, and how. Everything in here is public.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CentralTerms {
    /// Number of this promise, at least 1; another promise needs a higher one, as for a site's policy.
    pub version: u64,
    /// Largest ε of any site over all rounds.
    pub epsilon: Epsilon,
    /// δ.
    pub delta: Delta,
    /// σ: the noise has standard deviation σC on the sum.
    pub noise_multiplier: NoiseMultiplier,
    /// q: probability with which an update enters the sum.
    pub sampling_rate: SamplingRate,
    /// C: largest Euclidean norm of one update in the sum.
    pub clip_norm: L2Norm,
    /// N: sites that the fleet is taken to have. A public number; the sum is divided by qN.
    pub sites: u32,
}

impl CentralTerms {
    /// qN: what the sum is divided by.
    pub fn expected(&self) -> f64 {
        self.sampling_rate.value() * f64::from(self.sites)
    }

    /// The noise on the mean of `values` values, as Euclidean norm in multiples of C: σ√d/(qN). About 1 or less trains, above 5 does not.
    pub fn noise_to_signal(&self, values: u32) -> f64 {
        self.noise_multiplier.value() * f64::from(values).sqrt() / self.expected()
    }

    /// The promise as a policy of the ledger.
    ///
    /// # Errors
    /// [`PolicyError`] for a value out of a policy's range.
    pub fn policy(&self, centre: &NodeId) -> Result<Policy, PolicyError> {
        // `{:?}` of a float is a TOML float, digits and all.
        Policy::parse_any(&format!(
            "# Central noise of the aggregator: the unit is a whole site.\nversion = {}\nsite = \"{centre}\"\nunit = \"node\"\nepsilon = {:?}\n\
             delta = {:?}\nnoise_multiplier_min = {:?}\nsampling_rate_max = {:?}\nsteps_max = 1\nmechanisms = [\"moments\", \"delta\"]\n",
            self.version,
            self.epsilon.value(),
            self.delta.value(),
            self.noise_multiplier.value(),
            self.sampling_rate.value(),
        ))
    }
}

/// What a centre has spent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CentralSpent {
    /// ε of every site, over all rounds, as the ledger counts (RDP; holds for the discrete noise).
    pub epsilon: f64,
    /// The tighter second figure, for continuous noise.
    pub epsilon_pld: f64,
    /// The limit.
    pub epsilon_limit: f64,
    /// δ.
    pub delta: f64,
    /// Sums that were charged.
    pub rounds: u64,
    /// Whether the next sum would be refused.
    pub exhausted: bool,
}

/// A sum that was charged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CentralRound {
    /// The round.
    pub round: u64,
    /// Charges for it: more than one when a crash came between a charge and the publication.
    pub charges: u32,
    /// σ of the last.
    pub noise_multiplier: f64,
    /// q of the last.
    pub sampling_rate: f64,
    /// C of the last.
    pub clip_norm: f64,
}

/// Why a centre has no ledger to charge.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CentralError {
    /// The terms are no policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The ledger cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// The ledger of a centre with its terms.
#[derive(Debug)]
pub struct CentralLedger {
    ledger: Ledger,
    terms: CentralTerms,
}

impl CentralLedger {
    /// Opens the ledger or begins one, and locks it; `known` as for [`Ledger::open_known`].
    ///
    /// # Errors
    /// [`CentralError`]; then no sum may be read.
    pub fn open(
        path: &Path,
        centre: &NodeId,
        terms: CentralTerms,
        known: Option<&KnownHead>,
        now: Timestamp,
    ) -> Result<Self, CentralError> {
        let policy = terms.policy(centre)?;
        let ledger = Ledger::open_known(path, centre, policy, known, now)?;
        Ok(Self { ledger, terms })
    }

    /// What was spent, read without a lock, so also beside a running centre.
    ///
    /// # Errors
    /// [`CentralError`]
    pub fn inspect(path: &Path, centre: &NodeId, terms: CentralTerms) -> Result<CentralSpent, CentralError> {
        let policy = terms.policy(centre)?;
        Ok(spent(&Ledger::read(path, &policy)?, &policy, &terms))
    }

    /// The charges of one round, read without a lock, whatever the terms are by now. `None`: it was not charged, so it added no noise of the centre.
    ///
    /// # Errors
    /// [`LedgerError`]
    pub fn charges_of(path: &Path, round: Round) -> Result<Option<CentralRound>, LedgerError> {
        let of_round = |charge: &Charge| charge.round == round;
        let charges: Vec<Charge> = Ledger::read_charges(path)?.into_iter().filter(of_round).collect();
        Ok(charges.last().map(|last| CentralRound {
            round: round.0,
            charges: u32::try_from(charges.len()).unwrap_or(u32::MAX),
            noise_multiplier: last.noise_multiplier.value(),
            sampling_rate: last.sampling_rate,
            clip_norm: last.clip_norm.value(),
        }))
    }

    /// What was spent. Up to a second of work, for the second figure.
    pub fn spent(&self) -> CentralSpent {
        spent(self.ledger.state(), self.ledger.policy(), &self.terms)
    }

    /// The terms.
    pub fn terms(&self) -> &CentralTerms {
        &self.terms
    }

    /// How far the ledger has come; keep it elsewhere before the sum is read.
    pub fn known_head(&self) -> KnownHead {
        self.ledger.known_head()
    }

    /// Whether one more sum would be charged. Writes nothing.
    ///
    /// # Errors
    /// The [`ReserveError`] that [`CentralLedger::reserve`] would give.
    pub fn check(&self, now: Timestamp) -> Result<(), ReserveError> {
        let policy = self.ledger.policy();
        self.ledger.check(
            &plan(policy, &self.terms, Round(0), u64::MAX, UpdateKind::Moments, 1),
            now,
        )
    }

    /// Charges the sum of a round of `values` values. When this returns the charge is durable, and only then may the sum be read. Each reading is charged anew: a
    /// crash between the charge and the publication costs a second one.
    ///
    /// # Errors
    /// [`ReserveError`]; then nothing is charged and no sum may be read.
    pub fn reserve(
        &mut self,
        round: Round,
        kind: UpdateKind,
        values: u32,
        now: Timestamp,
    ) -> Result<CentralCharge, ReserveError> {
        let mut attempt = 0;
        loop {
            let plan = plan(self.ledger.policy(), &self.terms, round, attempt, kind, values);
            match self.ledger.reserve(plan, now)? {
                Reserved::Fresh(reservation) => {
                    return Ok(CentralCharge {
                        reservation,
                        terms: self.terms,
                    });
                }
                Reserved::AlreadyCharged { .. } => attempt += 1,
            }
        }
    }
}

fn spent(state: &State, policy: &Policy, terms: &CentralTerms) -> CentralSpent {
    let node = &state.lifetime.node;
    // Its round is never used, so only the budget and the policy can refuse it.
    let next = plan(policy, terms, Round(0), u64::MAX, UpdateKind::Moments, 1);
    CentralSpent {
        epsilon: node.epsilon(policy.delta()).epsilon,
        epsilon_pld: node.epsilon_pld(policy.delta()),
        epsilon_limit: policy.epsilon().value(),
        delta: policy.delta().value(),
        rounds: state.releases,
        exhausted: state.charge_of(policy, &next, Timestamp(0)).is_err(),
    }
}

fn plan(
    policy: &Policy,
    terms: &CentralTerms,
    round: Round,
    nonce: u64,
    kind: UpdateKind,
    values: u32,
) -> ReleasePlan {
    ReleasePlan {
        round,
        nonce,
        kind,
        values,
        block_span: policy.block_span(),
        blocks: Vec::new(),
        windows: None,
        sampling_rate: terms.sampling_rate.value(),
        steps: 1,
        clip_norm: terms.clip_norm,
        noise_multiplier: terms.noise_multiplier,
    }
}

/// A durable charge: the only key to one sum. Dropping it refunds nothing.
#[derive(Debug)]
#[must_use]
pub struct CentralCharge {
    reservation: Reservation,
    terms: CentralTerms,
}

/// A mean with the centre's noise on it. What is made of it is post-processing.
#[derive(Debug, Clone, PartialEq)]
pub struct CentralMean {
    /// The noisy sum divided by [`CentralTerms::expected`].
    pub values: Vec<f32>,
    /// qN, what it was divided by.
    pub expected: f64,
    /// σ of the mean: σC/(qN).
    pub deviation: f64,
}

impl CentralCharge {
    /// Throws a coin for each of `updates` updates, adds those up that came, each clipped to C, and adds the noise. `read` writes the values of an update into the
    /// buffer; it is called once for each that came, in order, and for no other.
    ///
    /// # Errors
    /// [`NoiseError`], also without randomness; the charge stays.
    pub fn mean(
        self,
        mechanism: &dyn NoiseMechanism,
        updates: usize,
        mut read: impl FnMut(usize, &mut [f32]),
    ) -> Result<CentralMean, NoiseError> {
        let plan = self.reservation.plan();
        let mut coins = PoissonSampler::new(self.terms.sampling_rate)?;
        let mut sum = GridSum::new(plan.values as usize, plan.clip_norm, plan.noise_multiplier);
        let mut buffer = vec![0.0; plan.values as usize];
        for update in coins.draw(updates) {
            buffer.fill(0.0);
            read(update, &mut buffer);
            sum.add(&buffer);
        }
        let noisy = release(
            mechanism,
            &sum,
            self.reservation.sensitivity(),
            self.reservation.rho(),
        )?;
        let expected = self.terms.expected();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "rounding noised values costs nothing"
        )]
        let values = noisy.into_iter().map(|x| (x / expected) as f32).collect();
        Ok(CentralMean {
            values,
            expected,
            deviation: plan.noise_multiplier.value() * plan.clip_norm.value() / expected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{ExactGaussian, FixedNoise};
    use crate::policy::PrivacyUnit;

    fn terms(epsilon: f64, sigma: f64, rate: f64, sites: u32) -> CentralTerms {
        CentralTerms {
            version: 1,
            epsilon: Epsilon::new(epsilon).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            noise_multiplier: NoiseMultiplier::new(sigma).unwrap(),
            sampling_rate: SamplingRate::new(rate).unwrap(),
            clip_norm: L2Norm::new(2.0).unwrap(),
            sites,
        }
    }

    fn centre() -> NodeId {
        NodeId::new("fleet").unwrap()
    }

    fn open(folder: &Path, terms: CentralTerms) -> CentralLedger {
        CentralLedger::open(&folder.join("central.log"), &centre(), terms, None, Timestamp(1)).unwrap()
    }

    fn reserve(ledger: &mut CentralLedger, round: u64, values: u32) -> Result<CentralCharge, ReserveError> {
        ledger.reserve(Round(round), UpdateKind::Delta, values, Timestamp(1))
    }

    #[test]
    fn the_mean_is_the_clipped_sum_and_its_noise_over_the_expected_number() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = open(folder.path(), terms(8.0, 4.0, 1.0, 10));
        let updates: [[f32; 2]; 4] = [[1.0, 0.0], [30.0, 40.0], [f32::NAN, 1.0], [0.0, -1.0]];
        let charge = reserve(&mut ledger, 1, 2).unwrap();
        let mean = charge
            .mean(&FixedNoise(1.0), updates.len(), |at, row| {
                row.copy_from_slice(&updates[at]);
            })
            .unwrap();
        // (30, 40) is cut to (1.2, 1.6), the broken one to nothing; one deviation is 8; ten sites were expected, not four.
        let found = [mean.values[0], mean.values[1]].map(f64::from);
        for (found, expected) in found.into_iter().zip([(2.2 + 8.0) / 10.0, (0.6 + 8.0) / 10.0]) {
            assert!((found - expected).abs() < 1e-5, "{mean:?}");
        }
        assert!((mean.deviation - 0.8).abs() < 1e-12);
    }

    #[test]
    fn only_updates_whose_coin_came_are_read_and_the_divisor_is_public() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = open(folder.path(), terms(50.0, 4.0, 0.25, 400));
        let (mut counts, mut means) = (std::collections::BTreeSet::new(), Vec::new());
        for round in 1..=20 {
            let mut read = Vec::new();
            let charge = reserve(&mut ledger, round, 1).unwrap();
            let mean = charge
                .mean(&FixedNoise(0.0), 400, |at, row| {
                    read.push(at);
                    row[0] = 1.0;
                })
                .unwrap();
            assert!(read.windows(2).all(|pair| pair[0] < pair[1]), "{read:?}");
            assert!((f64::from(mean.values[0]) - read.len() as f64 / 100.0).abs() < 1e-4);
            counts.insert(read.len());
            means.push(read.len() as f64);
        }
        assert!(counts.len() > 5, "the number that came hardly varies: {counts:?}");
        // 20 · 400 coins of ¼: standard deviation of the mean count is 8.66/√20 = 1.94; six of them.
        let mean = means.iter().sum::<f64>() / 20.0;
        assert!((mean - 100.0).abs() < 11.7, "{mean}");
    }

    #[test]
    fn the_noise_has_the_deviation_that_was_charged() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = open(folder.path(), terms(50.0, 3.0, 0.5, 20));
        let charge = reserve(&mut ledger, 1, 6000).unwrap();
        let mean = charge
            .mean(&ExactGaussian, 0, |_, _| panic!("nobody sent anything"))
            .unwrap();
        let squares: f64 = mean.values.iter().map(|x| f64::from(*x).powi(2)).sum();
        // σC/(qN) = 6/10; 6 000 draws lie within 6 % beyond 1 − 1e-10.
        let found = (squares / 6000.0).sqrt();
        assert!((found / 0.6 - 1.0).abs() < 0.06, "{found}");
    }

    #[test]
    fn every_sum_is_charged_before_it_is_read_until_the_budget_refuses() {
        let folder = tempfile::tempdir().unwrap();
        let terms = terms(2.0, 4.0, 1.0, 10);
        let mut ledger = open(folder.path(), terms);
        let (mut rounds, mut before) = (0_u64, 0.0);
        loop {
            assert_eq!(ledger.check(Timestamp(1)).is_ok(), !ledger.spent().exhausted);
            let head = ledger.known_head();
            match reserve(&mut ledger, rounds + 1, 3) {
                Ok(_charge) => rounds += 1,
                Err(error) => {
                    assert!(matches!(error, ReserveError::BudgetSpent { .. }), "{error}");
                    assert_eq!(ledger.known_head(), head, "a refusal charges nothing");
                    break;
                }
            }
            let spent = ledger.spent();
            assert!(spent.epsilon > before && spent.epsilon <= 2.0, "{spent:?}");
            assert!(
                spent.epsilon_pld > 0.0 && spent.epsilon_pld <= spent.epsilon,
                "{spent:?}"
            );
            before = spent.epsilon;
        }
        assert!(rounds > 0 && ledger.spent().exhausted);
        let path = folder.path().join("central.log");
        assert_eq!(
            CentralLedger::inspect(&path, &centre(), terms).unwrap(),
            ledger.spent()
        );
        drop(ledger);
        let again = open(folder.path(), terms);
        assert!(
            again.check(Timestamp(u64::MAX)).is_err(),
            "a restart brings nothing back"
        );
        assert_eq!(again.spent().rounds, rounds);
    }

    #[test]
    fn a_second_reading_of_the_same_round_is_a_second_charge() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = open(folder.path(), terms(8.0, 4.0, 1.0, 10));
        drop(reserve(&mut ledger, 7, 3).unwrap());
        let one = ledger.spent().epsilon;
        drop(reserve(&mut ledger, 7, 3).unwrap());
        assert!(ledger.spent().epsilon > one && ledger.spent().rounds == 2);
        let path = folder.path().join("central.log");
        let charges = CentralLedger::charges_of(&path, Round(7)).unwrap().unwrap();
        assert_eq!((charges.charges, charges.noise_multiplier), (2, 4.0));
        assert!(CentralLedger::charges_of(&path, Round(8)).unwrap().is_none());
    }

    /// The figure of the design's table for 100 000 sites, 1 000 a round, 1 000 rounds at σ 0.82: ε = 4.
    #[test]
    fn sampling_lowers_the_charge_as_the_accountant_says() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = open(folder.path(), terms(4.5, 0.82, 0.01, 100_000));
        for round in 1..=3 {
            drop(reserve(&mut ledger, round, 3).unwrap());
        }
        let expected = crate::ledger::loss::Loss::gaussian(1.0, 0.82, 0.01, 3);
        let delta = Delta::new(1e-6).unwrap();
        let found = ledger.spent().epsilon;
        assert!(
            (found / expected.epsilon(delta).epsilon - 1.0).abs() < 1e-9,
            "{found}"
        );
        let thousand = crate::ledger::loss::Loss::gaussian(1.0, 0.82, 0.01, 1000);
        assert!((thousand.epsilon(delta).epsilon / 4.0 - 1.0).abs() < 0.05);
    }

    #[test]
    fn another_promise_needs_a_higher_version_and_a_copy_from_before_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("central.log");
        let first = terms(4.0, 4.0, 1.0, 10);
        let mut ledger = open(folder.path(), first);
        let copy = std::fs::read(&path).unwrap();
        drop(reserve(&mut ledger, 1, 3).unwrap());
        let known = ledger.known_head();
        drop(ledger);
        let looser = CentralTerms {
            epsilon: Epsilon::new(40.0).unwrap(),
            ..first
        };
        let refused = CentralLedger::open(&path, &centre(), looser, Some(&known), Timestamp(1));
        assert!(
            matches!(
                refused,
                Err(CentralError::Ledger(LedgerError::PolicyUnversioned {
                    version: 1
                }))
            ),
            "{refused:?}"
        );
        let named = CentralTerms { version: 2, ..looser };
        drop(CentralLedger::open(&path, &centre(), named, Some(&known), Timestamp(1)).unwrap());
        std::fs::write(&path, copy).unwrap();
        let back = CentralLedger::open(&path, &centre(), first, Some(&known), Timestamp(1));
        assert!(
            matches!(back, Err(CentralError::Ledger(LedgerError::WentBackwards { .. }))),
            "{back:?}"
        );
    }

    #[test]
    fn no_site_has_a_policy_of_the_centre_and_no_ledger_of_one_serves_the_other() {
        let text = terms(4.0, 4.0, 1.0, 10).policy(&centre()).unwrap();
        assert_eq!(text.unit(), PrivacyUnit::Node);
        let refused = Policy::parse(text.text());
        assert!(
            matches!(refused, Err(PolicyError::Range { key: "unit", .. })),
            "{refused:?}"
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("central.log");
        drop(open(folder.path(), terms(4.0, 4.0, 1.0, 10)));
        let site = Policy::parse("site = \"fleet\"\nepsilon = 4\n").unwrap();
        let other = Ledger::open(&path, &centre(), site, Timestamp(1));
        assert!(matches!(other, Err(LedgerError::UnitChanged { .. })), "{other:?}");
    }
}
