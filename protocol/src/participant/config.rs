//! What an edge's own policy says about rounds.

use crate::message::{AnnounceV1, DeclineReason, UpdateKind};
use crate::units::{Digest, L2Norm, NoiseMultiplier};

/// What this edge will take part in.
#[derive(Debug, Clone, PartialEq)]
pub struct ParticipantConfig {
    /// Least noise multiplier of the edge's own policy.
    pub noise_multiplier_min: NoiseMultiplier,
    /// Largest clipping norm, if the policy names one.
    pub clip_norm_max: Option<L2Norm>,
    /// The layouts that the edge knows.
    pub layout_digests: LayoutDigests,
}

/// Digests of the layouts that an edge knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayoutDigests {
    /// Of the model.
    pub model: Digest,
    /// Of the model with a full linear part, as rounds of gradients make it.
    pub linear_model: Digest,
    /// Of an update of kind [`Moments`](crate::message::UpdateKind::Moments).
    pub moments: Digest,
    /// Of an update of kind [`Delta`](crate::message::UpdateKind::Delta).
    pub delta: Digest,
    /// Of an update of kind [`Gradient`](crate::message::UpdateKind::Gradient).
    pub gradient: Digest,
}

impl ParticipantConfig {
    /// Whether a round's terms are ones this edge may work under.
    ///
    /// # Errors
    /// The reason to decline with.
    pub fn accepts(&self, announce: &AnnounceV1) -> Result<(), DeclineReason> {
        let layout = match announce.kind {
            UpdateKind::Moments => self.layout_digests.moments,
            UpdateKind::Delta => self.layout_digests.delta,
            UpdateKind::Gradient => self.layout_digests.gradient,
        };
        let empty = announce.values == 0 || announce.block_rows == 0 || announce.blocks_max == 0;
        if announce.layout_digest != layout || empty {
            return Err(DeclineReason::UnknownLayout);
        }
        let too_large = self.clip_norm_max.is_some_and(|max| announce.clip_norm > max);
        if announce.noise_multiplier < self.noise_multiplier_min || too_large {
            return Err(DeclineReason::TermsTooWeak);
        }
        Ok(())
    }
}
