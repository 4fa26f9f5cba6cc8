//! Honest sites: real moments of a seeded series, charged, clipped and noised by the code of the edge.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_model::feature::FeatureSchema;
use theriac_model::global::moments_layout;
use theriac_model::moments::{BLOCK_CLIP_NORM, BLOCK_ROWS, block, public_values};
use theriac_model::series::Series;
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::Policy;
use theriac_privacy::update::LocalUpdate;
use theriac_protocol::codec::encode_to_aggregator;
use theriac_protocol::message::{AnnounceV1, ToAggregator, UpdateKind, UpdateV1};
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{Digest, L2Norm, NodeId, NoiseMultiplier, Timestamp};

pub(crate) const BLOCK_SPAN: Duration = Duration::from_mins(1);

pub(crate) fn schema() -> FeatureSchema {
    FeatureSchema::host_service_v1()
}

/// The terms of recipe A for the host profile.
pub(crate) fn terms() -> RoundTerms {
    let layout = moments_layout(schema().channels());
    RoundTerms {
        kind: UpdateKind::Moments,
        values: u32::try_from(layout.len()).unwrap(),
        layout_digest: Digest(layout.digest()),
        clip_norm: L2Norm::new(BLOCK_CLIP_NORM).unwrap(),
        noise_multiplier: NoiseMultiplier::new(1.27).unwrap(),
        block_rows: u32::try_from(BLOCK_ROWS).unwrap(),
        blocks_min: 1,
        blocks_max: 64,
    }
}

pub(crate) fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// A slowly wandering series of `blocks` blocks around the profile's public constants.
pub(crate) fn series(blocks: usize, seed: u64) -> Series {
    let schema = schema();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut level: Vec<f32> = schema.features.iter().map(|f| f.location).collect();
    let mut values = Vec::new();
    for _ in 0..blocks * BLOCK_ROWS {
        for (level, feature) in level.iter_mut().zip(&schema.features) {
            *level += (rng.random::<f32>() - 0.5) * feature.scale * 0.2;
            values.push(level.max(0.0));
        }
    }
    Series::new(schema.channels(), values).unwrap()
}

/// The site's ledger in `folder`, with a budget for one release of each block.
pub(crate) fn ledger(folder: &Path, site: &NodeId) -> Ledger {
    let policy = Policy::parse(&format!("site = \"{site}\"\nepsilon = 4\nblock = \"60s\"")).unwrap();
    Ledger::open(&folder.join(format!("{site}.log")), site, policy, Timestamp(0)).unwrap()
}

/// The whole way of an edge: charge, read, clip, noise, compress.
pub(crate) fn update(
    ledger: &mut Ledger,
    announce: &AnnounceV1,
    series: &Series,
    seed: u64,
) -> (UpdateV1, Bytes) {
    let blocks = (series.rows() / BLOCK_ROWS) as u64;
    let plan = ReleasePlan {
        round: announce.round,
        nonce: announce.nonce,
        kind: announce.kind,
        values: announce.values,
        block_span: BLOCK_SPAN,
        blocks: (announce.round.0 * 1000..announce.round.0 * 1000 + blocks).collect(),
        windows: None,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: announce.clip_norm,
        noise_multiplier: announce.noise_multiplier,
    };
    let Reserved::Fresh(reservation) = ledger.reserve(plan, Timestamp(1)).unwrap() else {
        panic!("charged before")
    };
    let id = reservation.id();
    let read = |_: &[u64]| block_vectors(series);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let compressed = LocalUpdate::moments(reservation, announce.layout_digest, read)
        .unwrap()
        .clip()
        .noise(&ExactGaussian)
        .unwrap()
        .compress(|| rng.random());
    ledger
        .mark_released(id, compressed.payload_digest(), Timestamp(2))
        .unwrap();
    compressed.into_message(announce.base_digest, announce.blocks_max)
}

/// One vector of moments for each block.
pub(crate) fn block_vectors(series: &Series) -> Vec<Vec<f32>> {
    let values = public_values(&schema(), series);
    values
        .chunks_exact(BLOCK_ROWS * series.channels())
        .map(|rows| block(rows, BLOCK_ROWS))
        .collect()
}

/// The bytes of an update's frame.
pub(crate) fn frame(header: &UpdateV1, payload: &Bytes) -> Vec<u8> {
    let encoded = encode_to_aggregator(&ToAggregator::Update(header.clone(), payload.clone())).unwrap();
    [encoded.head, encoded.payload].concat()
}

/// Updates of the sites `site-a` to `site-e` for one announcement.
pub(crate) fn frames(announce: &AnnounceV1) -> Vec<(NodeId, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    let site = |(seed, name): (u64, &str)| {
        let site = node(name);
        let mut ledger = ledger(folder.path(), &site);
        let (header, payload) = update(&mut ledger, announce, &series(8, seed), seed);
        (site, frame(&header, &payload))
    };
    (1..)
        .zip(["site-a", "site-b", "site-c", "site-d", "site-e"])
        .map(site)
        .collect()
}
