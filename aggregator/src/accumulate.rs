//! Moments of earlier rounds beside those of the round at hand: what the rule sees of a site is the mean of its last releases, and the model is solved
//! from that mean times all releases behind it.
//!
//! Releases of disjoint blocks add up: `v₁ + v₂` is what one release of both sets of blocks is but for its noise, whose standard deviation is σC√2 and not σC.
//! So k releases of b blocks have √k times less noise for their signal than one of them, and a site with a few blocks in memory still teaches after some
//! rounds. It is made of what sites have released, so it costs no privacy (post-processing).
//!
//! - **Means, not sums, go to the rule.** Rules compare sites. Sums of sites that have taken part more and less often differ by how often that was, and a rule
//!   would cut the rare ones away as outliers; means agree in all but their noise. How many releases are in a mean the aggregator has counted itself: what a site
//!   claims of its blocks is not asked for. What one site can do in a round is therefore what it can do in any: one row, weight 1. In time it is more: a release
//!   that is found good once counts until it is too old, whatever its site does then, unless it is dropped ([`crate::store::sums::Dropped`]).
//! - **A site that sends nothing in a round** still counts with what it has released, as long as that is not too old: moments do not depend on the model, its
//!   blocks are as true as they were, and else the model would change with who happens to be connected. It has one row either way, so f means what it meant.
//! - **Screens** look at the fresh release, whose noise has a known law. The vet looks at the mean as well ([`crate::vet::look_at_mean`]), also of a site
//!   that sends nothing: with less noise it sees more. What it finds drops all that is in the mean.
//! - **There is no running sum.** What is kept are the releases, each once ([`crate::store::sums`]), and the mean is made anew from them, newest first, in `f64`:
//!   a window forgets exactly, a release is taken back exactly, the same bytes of a site are in its mean once, and `rounds replay` gives the same bits.

use serde::{Deserialize, Serialize};
use theriac_protocol::message::{AnnounceV1, UpdateKind};
use theriac_protocol::units::Digest;

use crate::average::Mean;
use crate::robust::Row;

/// What moments are made of besides the announced terms: lags, public scale, centre, presence and level of `theriac_model::moments`. Another name begins other sums.
const RECIPE: &str = "moments-1";

/// How much of a site's earlier releases counts. Part of a round's plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Accumulate {
    /// Most releases of a site in its mean, the one at hand among them; 0 and 1: no other.
    pub keep: u32,
    /// How long before the round's opening a release may have been taken in, in milliseconds.
    pub age_ms: u64,
}

impl Accumulate {
    /// Every round on its own.
    pub const OFF: Self = Self { keep: 0, age_ms: 0 };

    /// Whether a round of this kind adds earlier ones.
    pub fn is_on(self, kind: UpdateKind) -> bool {
        self.keep > 1 && kind == UpdateKind::Moments
    }
}

/// Digest of everything that two releases have in common which may be added: kind, layout, clipping norm, noise, rows of a block and the recipe. How many blocks
/// a release may have is not among it: a sum does not mind. Neither is the profile, of which there is one with moments (`host-service-v1`): a second one that differs
/// in more than its number of channels must come in here.
pub fn sum_terms(announce: &AnnounceV1) -> Digest {
    let common = (
        RECIPE,
        announce.kind,
        announce.values,
        announce.layout_digest,
        announce.clip_norm,
        announce.noise_multiplier,
        announce.block_rows,
    );
    Digest::of(serde_json::to_string(&common).unwrap_or_default().as_bytes())
}

/// What stands behind a site's row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Behind {
    /// Releases in its mean.
    pub releases: u64,
    /// Blocks in them, at least: edges do not tell how many, a round's terms bound it.
    pub blocks_min: u64,
    /// Blocks in them, at most.
    pub blocks_max: u64,
}

impl Behind {
    /// One release under these bounds.
    pub fn one(blocks_min: u32, blocks_max: u32) -> Self {
        Self {
            releases: 1,
            blocks_min: blocks_min.into(),
            blocks_max: blocks_max.into(),
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            releases: self.releases + other.releases,
            blocks_min: self.blocks_min + other.blocks_min,
            blocks_max: self.blocks_max + other.blocks_max,
        }
    }
}

/// The mean of a site's releases as a row for a rule, `releases` newest first, and the standard deviation of its noise in that of one release, 1/√k.
pub fn mean_of<'a>(dimension: usize, releases: impl IntoIterator<Item = &'a Row>) -> (Row, f64) {
    let mut mean = Mean::new(dimension);
    for row in releases {
        mean.add(row, 1.0, 1.0);
    }
    let ratio = mean.noise_ratio();
    (mean.into_row(), ratio)
}

/// How much is behind the rows that a rule combined: what turns their mean back into sums.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Depth {
    /// Root mean square over the rows of the standard deviation of their noise, in that of one release; above 0, at most 1.
    pub noise_ratio: f64,
    /// Mean number of releases of a row, at least 1.
    pub releases: f64,
}

impl Depth {
    /// Rows of one release each.
    pub const ONE: Self = Self {
        noise_ratio: 1.0,
        releases: 1.0,
    };

    /// Of rows with these noise ratios and numbers of releases. No row is as [`Depth::ONE`].
    pub fn of(rows: impl IntoIterator<Item = (f64, u64)>) -> Self {
        let (mut count, mut squares, mut releases) = (0_u32, 0.0, 0.0);
        for (ratio, of) in rows {
            count += 1;
            squares += ratio * ratio;
            releases += of.max(1) as f64;
        }
        if count == 0 {
            return Self::ONE;
        }
        Self {
            noise_ratio: (squares / f64::from(count)).sqrt(),
            releases: releases / f64::from(count),
        }
    }

    /// Noise multiplier of one site's sum of so many releases, from that of one release: for k releases in every row σ√k.
    pub fn sigma(self, one: f64) -> f64 {
        one * self.noise_ratio * self.releases
    }
}

#[cfg(test)]
mod tests {
    use theriac_protocol::compress::{decode_range, encode_f32};
    use theriac_protocol::message::Encoding;
    use theriac_protocol::units::{L2Norm, ModelVersion, NoiseMultiplier, Round};

    use super::*;

    fn announce() -> AnnounceV1 {
        AnnounceV1 {
            round: Round(1),
            nonce: 1,
            kind: UpdateKind::Moments,
            values: 22,
            layout_digest: Digest::default(),
            base_version: ModelVersion(0),
            base_digest: Digest::default(),
            clip_norm: L2Norm::new(240.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(1.27).unwrap(),
            block_rows: 60,
            blocks_min: 1,
            blocks_max: 10,
            deadline_ms: 1,
        }
    }

    #[test]
    fn only_what_may_be_added_has_the_same_terms() {
        let one = announce();
        let other = AnnounceV1 {
            round: Round(7),
            nonce: 3,
            base_version: ModelVersion(2),
            blocks_min: 2,
            blocks_max: 60,
            deadline_ms: 9,
            ..announce()
        };
        assert_eq!(sum_terms(&one), sum_terms(&other));
        let changes: [fn(&mut AnnounceV1); 6] = [
            |terms| terms.kind = UpdateKind::Delta,
            |terms| terms.values = 44,
            |terms| terms.layout_digest = Digest([1; 32]),
            |terms| terms.clip_norm = L2Norm::new(241.0).unwrap(),
            |terms| terms.noise_multiplier = NoiseMultiplier::new(1.28).unwrap(),
            |terms| terms.block_rows = 61,
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let mut changed = announce();
            change(&mut changed);
            assert_ne!(sum_terms(&changed), sum_terms(&one), "change {at}");
        }
    }

    #[test]
    fn k_releases_have_the_mean_of_their_values_and_a_kth_root_of_the_noise() {
        let row = |value: f32| Row {
            encoding: Encoding::F32,
            payload: encode_f32(&[value, -value]).into(),
        };
        let releases = [row(1.0), row(2.0), row(6.0), row(7.0)];
        let (mean, ratio) = mean_of(2, &releases);
        let mut values = [0.0; 2];
        decode_range(mean.encoding, &mean.payload, 0, &mut values);
        assert_eq!(values.map(f32::to_bits), [4.0_f32, -4.0].map(f32::to_bits));
        assert!((ratio - 0.5).abs() < 1e-12);
        let depth = Depth::of([(0.5, 4); 3]);
        assert!((depth.releases - 4.0).abs() < 1e-12);
        assert!((depth.sigma(1.27) - 1.27 * 2.0).abs() < 1e-12, "σ√k");
        assert_eq!(Depth::of([(1.0, 1); 5]), Depth::ONE);
        assert_eq!(Depth::of([]), Depth::ONE);
    }
}
