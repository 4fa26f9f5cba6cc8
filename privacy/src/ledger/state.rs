//! What the records of a ledger add up to. Pure: no file, no clock.

use std::collections::BTreeMap;

use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Digest, NodeId, Timestamp};

use super::charges::BlockCharges;
use super::loss::Loss;
use super::record::{Charge, Charged, Counted, Genesis, PolicyNote, Record, Seal, Terms};
use super::{ReleasePlan, ReservationId, ReserveError, Spent, plan};
use crate::accountant::RdpEpsilon;
use crate::policy::{Period, Policy, PrivacyUnit};

/// The sum of all records.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    pub(crate) owner: Option<Owner>,
    /// The policy in force.
    pub(crate) policy: PolicySeen,
    /// Everything that was ever charged.
    pub(crate) lifetime: Account,
    /// What was charged in the current period; not kept for [`Period::Rolling`], whose period is all time.
    period: Account,
    period_index: u64,
    /// The kind of period was changed, and nothing has been charged since.
    carried_over: bool,
    /// All releases together, as if every one had read the same unit.
    pub(crate) summed: Loss,
    pub(crate) releases: u64,
    pub(crate) records: u64,
    /// The last counter-signature of the aggregator.
    pub(crate) seal: Option<Seal>,
    pub(crate) reservations: BTreeMap<ReservationId, Option<Digest>>,
    /// Whether a charge of the second format was counted: the first is not written any more.
    renyi: bool,
    /// The last terms and their loss: charges in a row mostly have the same.
    memo: Option<(Terms, Loss)>,
}

/// What the first record says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Owner {
    pub(crate) node: NodeId,
    pub(crate) unit: PrivacyUnit,
    pub(crate) block_ms: u64,
}

/// What the last policy record says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PolicySeen {
    pub(crate) hash: Digest,
    /// 0: written before policies had versions.
    pub(crate) version: u64,
    pub(crate) period: Period,
    /// Of text and signature: the same meaning may be spelt or signed anew.
    pub(crate) spelling: Digest,
}

impl PolicySeen {
    /// What a record of this policy will say.
    pub(crate) fn of(policy: &Policy) -> Self {
        let signature = policy.signature().map(ToString::to_string);
        Self {
            hash: policy.hash(),
            version: policy.version(),
            period: policy.period(),
            spelling: spelling(Some(policy.text()), signature.as_deref()),
        }
    }
}

fn spelling(text: Option<&str>, signature: Option<&str>) -> Digest {
    let parts = [text.unwrap_or_default(), "\0", signature.unwrap_or_default()];
    Digest::of(parts.concat().as_bytes())
}

/// Losses by block.
#[derive(Debug, Clone, Default)]
pub(crate) struct Account {
    pub(crate) blocks: BlockCharges,
    /// Of releases made of all the node's data: every block bears it.
    pub(crate) node: Loss,
}

impl Account {
    fn add(&mut self, blocks: &[(u64, u64)], loss: &Loss) {
        if blocks.is_empty() {
            self.node.add(loss);
        }
        for (first, last) in blocks {
            self.blocks.add(*first..=*last, loss);
        }
    }

    /// ε of the most charged block; 0 when nothing was charged.
    pub(crate) fn epsilon(&self, policy: &Policy) -> RdpEpsilon {
        let of_block = |loss: &Loss| self.node.plus(loss).epsilon(policy.delta());
        let untouched = self.node.epsilon(policy.delta());
        self.blocks.losses().map(of_block).fold(untouched, larger)
    }

    /// The tighter second figure of the most charged block. Of the blocks in falling order of the first figure, which bounds the second, only those are
    /// looked at that could still be the largest.
    pub(crate) fn epsilon_pld(&self, delta: Delta) -> f64 {
        let mut losses: Vec<(f64, Loss)> = std::iter::once(self.node.clone())
            .chain(self.blocks.losses().map(|loss| self.node.plus(loss)))
            .map(|loss| (loss.epsilon(delta).epsilon, loss))
            .collect();
        losses.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let mut most = 0.0;
        for (bound, loss) in losses {
            if bound <= most {
                break;
            }
            most = loss.epsilon_pld(delta).max(most);
        }
        most
    }
}

impl State {
    /// Counts one more record, or says what is wrong with it; then nothing was counted.
    pub(crate) fn take(&mut self, body: &[u8]) -> Result<(), &'static str> {
        let record: Record = serde_json::from_slice(body).map_err(|_| "a record does not parse")?;
        match record {
            Record::Genesis(genesis) => self.begin(genesis)?,
            _ if self.owner.is_none() => return Err("the first record is missing"),
            Record::Policy(note) => self.note_policy(&note)?,
            Record::Reserve(_) if self.renyi => {
                return Err("a charge of the first format after one of the second");
            }
            Record::Reserve(charged) => {
                let unit = self.owner.as_ref().map_or(PrivacyUnit::Block, |owner| owner.unit);
                self.charge(charged.check(unit)?)?;
            }
            Record::Charge(charge) => {
                let counted = self.check(*charge)?;
                self.charge(counted)?;
                self.renyi = true;
            }
            Record::Sealed(seal) => self.keep_seal(seal)?,
            Record::Released {
                round,
                nonce,
                payload,
                ..
            } => match self.reservations.get_mut(&ReservationId { round, nonce }) {
                Some(released @ None) => *released = Some(payload),
                _ => return Err("a release without its charge, or a second one"),
            },
        }
        self.records += 1;
        Ok(())
    }

    fn begin(&mut self, genesis: Genesis) -> Result<(), &'static str> {
        if self.owner.is_some() {
            return Err("a second first record");
        }
        let Genesis {
            node, unit, block_ms, ..
        } = genesis;
        self.owner = Some(Owner { node, unit, block_ms });
        Ok(())
    }

    fn keep_seal(&mut self, seal: Seal) -> Result<(), &'static str> {
        if self
            .seal
            .as_ref()
            .is_some_and(|last| last.records >= seal.records)
        {
            return Err("a counter-signature of no more than the one before");
        }
        self.seal = Some(seal);
        Ok(())
    }

    fn note_policy(&mut self, note: &PolicyNote) -> Result<(), &'static str> {
        if note.version < self.policy.version {
            return Err("a policy older than the one before");
        }
        let seen = PolicySeen {
            hash: note.hash,
            version: note.version,
            period: note.period,
            spelling: spelling(note.text.as_deref(), note.signature.as_deref()),
        };
        if note.version > 0 && seen == self.policy {
            return Err("a policy that was in force already");
        }
        if note.period != self.policy.period {
            // What was charged so far counts in the period of the next charge, whichever that is: too much rather than too little.
            self.period = self.lifetime.clone();
            (self.period_index, self.carried_over) = (0, true);
        }
        self.policy = seen;
        Ok(())
    }

    /// Whether a charge follows from its terms and stands in its place.
    fn check(&mut self, charge: Charge) -> Result<Counted, &'static str> {
        if charge.sequence != self.records {
            return Err("a charge does not stand in its place");
        }
        if self.owner.as_ref().is_some_and(|owner| owner.unit != charge.unit) {
            return Err("a charge of another unit");
        }
        if charge.period < self.period_index {
            return Err("a charge of a period that was over");
        }
        let loss = match &self.memo {
            Some((terms, loss)) if *terms == charge.terms() => loss.clone(),
            _ => charge.terms().loss(),
        };
        self.memo = Some((charge.terms(), loss.clone()));
        charge.check(&loss)
    }

    fn charge(&mut self, counted: Counted) -> Result<(), &'static str> {
        let Counted {
            id,
            blocks,
            loss,
            period,
        } = counted;
        if self.reservations.contains_key(&id) {
            return Err("a round was charged twice");
        }
        self.reservations.insert(id, None);
        self.lifetime.add(&blocks, &loss);
        if self.policy.period != Period::Rolling {
            if self.begins_anew(period) {
                self.period = Account::default();
            }
            (self.period_index, self.carried_over) = (period, false);
            self.period.add(&blocks, &loss);
        }
        self.summed.add(&loss);
        self.releases += 1;
        Ok(())
    }

    /// The charge of `plan`, or why it is not made.
    pub(crate) fn charge_of(
        &self,
        policy: &Policy,
        plan: &ReleasePlan,
        at: Timestamp,
    ) -> Result<Charge, ReserveError> {
        let blocks = plan::check(policy, plan, at)?;
        if let Some(releases_max) = policy.releases_max().filter(|max| self.releases >= *max) {
            return Err(ReserveError::ReleasesSpent {
                releases: self.releases,
                releases_max,
            });
        }
        for block in &plan.blocks {
            let releases = self.lifetime.blocks.of(*block).releases;
            if releases >= policy.block_releases_max() {
                return Err(ReserveError::BlockAlreadyCharged {
                    block: *block,
                    releases,
                    releases_max: policy.block_releases_max(),
                });
            }
        }
        let terms = Terms::of(plan, policy.unit());
        let loss = terms.loss();
        let period = self.period_at(policy, at);
        self.covered(policy, &blocks, &loss, period)?;
        Ok(Charge {
            sequence: self.records,
            round: plan.round,
            nonce: plan.nonce,
            kind: plan.kind,
            unit: policy.unit(),
            values: plan.values,
            blocks,
            windows: plan.windows,
            clip_norm: plan.clip_norm,
            noise_multiplier: plan.noise_multiplier,
            sampling_rate: plan.sampling_rate,
            steps: plan.steps,
            sensitivity: terms.sensitivity(),
            rdp: loss.curve().clone(),
            period,
            policy: policy.hash(),
            at,
            salt: None,
        })
    }

    /// Whether the policy let this charge be made at this place.
    pub(crate) fn kept(&self, policy: &Policy, charge: &Charge) -> Result<(), ReserveError> {
        let plan = ReleasePlan {
            round: charge.round,
            nonce: charge.nonce,
            kind: charge.kind,
            values: charge.values,
            block_span: policy.block_span(),
            blocks: charge.blocks.iter().map(|(first, _)| *first).collect(),
            windows: charge.windows,
            sampling_rate: charge.sampling_rate,
            steps: charge.steps,
            clip_norm: charge.clip_norm,
            noise_multiplier: charge.noise_multiplier,
        };
        self.borne(policy, &plan, &charge.blocks, charge.at)?;
        if charge.period != self.period_at(policy, charge.at) {
            return Err(ReserveError::BadPlan(
                "it is charged to another period than its time's",
            ));
        }
        self.covered(policy, &charge.blocks, &charge.terms().loss(), charge.period)
    }

    /// The same for a charge of the first format: one step of whole blocks, in zCDP. It counts in the period that is under way.
    pub(crate) fn kept_first(&self, policy: &Policy, charge: &Charged) -> Result<(), ReserveError> {
        let plan = ReleasePlan {
            round: charge.round,
            nonce: charge.nonce,
            kind: charge.kind,
            values: charge.values,
            block_span: policy.block_span(),
            blocks: charge.blocks.iter().map(|(first, _)| *first).collect(),
            windows: None,
            sampling_rate: 1.0,
            steps: 1,
            clip_norm: charge.clip_norm,
            noise_multiplier: charge.noise_multiplier,
        };
        self.borne(policy, &plan, &charge.blocks, charge.at)?;
        self.covered(policy, &charge.blocks, &Loss::zcdp(charge.rho), self.period_index)
    }

    /// Whether the policy allowed such a charge of these blocks at this place, whatever it cost. The plan names one block of each run: the oldest, which is what
    /// can be too old.
    fn borne(
        &self,
        policy: &Policy,
        plan: &ReleasePlan,
        blocks: &[(u64, u64)],
        at: Timestamp,
    ) -> Result<(), ReserveError> {
        plan::check(policy, plan, at)?;
        if let Some(releases_max) = policy.releases_max().filter(|max| self.releases >= *max) {
            return Err(ReserveError::ReleasesSpent {
                releases: self.releases,
                releases_max,
            });
        }
        for (first, last) in blocks {
            let (block, releases) = self.lifetime.blocks.most_releases(*first..=*last);
            if releases >= policy.block_releases_max() {
                return Err(ReserveError::BlockAlreadyCharged {
                    block,
                    releases,
                    releases_max: policy.block_releases_max(),
                });
            }
        }
        Ok(())
    }

    /// Those of the plan's blocks that could bear it now: charged less often than the policy allows, and within its ε afterwards.
    pub(crate) fn affordable(&self, policy: &Policy, plan: &ReleasePlan, at: Timestamp) -> Vec<u64> {
        let loss = Terms::of(plan, policy.unit()).loss();
        let nothing = Account::default();
        let account = if self.begins_anew(self.period_at(policy, at)) {
            &nothing
        } else {
            self.current(policy)
        };
        let node = account.node.plus(&loss);
        let mut memo: Option<(Loss, bool)> = None;
        let mut bears = |block: &u64| {
            let charged = account.blocks.of(*block).loss;
            let within = match &memo {
                Some((known, within)) if *known == charged => *within,
                _ => node.plus(&charged).epsilon(policy.delta()).epsilon <= policy.epsilon().value(),
            };
            memo = Some((charged, within));
            within && self.lifetime.blocks.of(*block).releases < policy.block_releases_max()
        };
        plan.blocks.iter().copied().filter(|block| bears(block)).collect()
    }

    /// Whether not even an untouched block could be released, whatever the noise.
    pub(crate) fn is_exhausted(&self, policy: &Policy) -> bool {
        let account = self.current(policy);
        let untouched = account.node.epsilon(policy.delta()).epsilon;
        let no_more = policy.releases_max().is_some_and(|most| self.releases >= most);
        no_more || untouched >= policy.epsilon().value()
    }

    /// The account that the policy's limit holds for.
    pub(crate) fn current(&self, policy: &Policy) -> &Account {
        match policy.period() {
            Period::Rolling => &self.lifetime,
            _ => &self.period,
        }
    }

    /// Whether a charge in this period is the first of it.
    fn begins_anew(&self, period: u64) -> bool {
        period > self.period_index && !self.carried_over
    }

    /// Number of the period at `at`. A clock that went back does not bring an earlier period back.
    fn period_at(&self, policy: &Policy, at: Timestamp) -> u64 {
        policy.period().index(at).max(self.period_index)
    }

    /// Whether no unit would pass the limit.
    fn covered(
        &self,
        policy: &Policy,
        blocks: &[(u64, u64)],
        loss: &Loss,
        period: u64,
    ) -> Result<(), ReserveError> {
        let epsilon = |loss: Loss| loss.epsilon(policy.delta());
        let nothing = Account::default();
        let account = if self.begins_anew(period) {
            &nothing
        } else {
            self.current(policy)
        };
        let after = if blocks.is_empty() {
            let node = account.node.plus(loss);
            account
                .blocks
                .losses()
                .map(|block| epsilon(node.plus(block)))
                .fold(epsilon(node.clone()), larger)
        } else {
            let node = account.node.plus(loss);
            let touched = blocks
                .iter()
                .flat_map(|(first, last)| account.blocks.losses_in(*first..=*last));
            // Blocks that it does not name lose nothing by it: where a stricter policy came after they were charged, they keep no others back.
            touched
                .map(|block| epsilon(node.plus(&block)))
                .fold(epsilon(node.clone()), larger)
        };
        let (epsilon_after, epsilon_limit) = (after.epsilon, policy.epsilon());
        // Not `>`: what is not a number must refuse.
        if epsilon_after <= epsilon_limit.value() {
            return Ok(());
        }
        Err(ReserveError::BudgetSpent {
            unit: policy.unit(),
            period: policy.period().label(period),
            epsilon_after,
            epsilon_limit,
        })
    }

    pub(crate) fn spent(&self, policy: &Policy, heads: &[Digest]) -> Spent {
        let ever = self.lifetime.epsilon(policy);
        let now = self.current(policy).epsilon(policy);
        Spent {
            epsilon: now.epsilon,
            order: now.order,
            period: policy.period(),
            period_index: self.period_index,
            epsilon_limit: policy.epsilon(),
            epsilon_unit_lifetime: ever.epsilon,
            epsilon_lifetime: self.summed.epsilon(policy.delta()).epsilon,
            delta: policy.delta(),
            releases: self.releases,
            head: heads.last().copied().unwrap_or_default(),
            records: heads.len() as u64,
        }
    }
}

/// Whether this kind of plan is charged to all blocks alike; at a trusted centre, to all nodes.
pub(crate) fn reads_everything(unit: PrivacyUnit, kind: UpdateKind, blocks: usize) -> bool {
    blocks == 0 && (kind == UpdateKind::Delta || unit == PrivacyUnit::Node)
}

fn larger(a: RdpEpsilon, b: RdpEpsilon) -> RdpEpsilon {
    if b.epsilon > a.epsilon { b } else { a }
}
