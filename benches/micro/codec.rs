//! Messages to bytes and back, and the compression of an update.

use std::error::Error;
use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput};
use theriac_benches::Numbers;
use theriac_protocol::codec::{decode_to_aggregator, encode_to_aggregator};
use theriac_protocol::compress::{decode_range, encode_int8, scan};
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES};
use theriac_protocol::message::{PrivacyClaimV1, ToAggregator, UpdateKind, UpdateV1};
use theriac_protocol::units::{Delta, Digest, Epsilon, L2Norm, NoiseMultiplier, Round};

const DIMENSION: u32 = 100_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut numbers = Numbers::new(2);
    let values = numbers.signed(usize::try_from(DIMENSION)?);
    let (encoding, payload) = encode_int8(&values, || numbers.draw());
    let payload = Bytes::from(payload);
    let message = ToAggregator::Update(
        UpdateV1 {
            round: Round(7),
            nonce: 11,
            kind: UpdateKind::Delta,
            base_digest: Digest::of(b"base"),
            layout_digest: Digest::of(b"layout"),
            values: DIMENSION,
            encoding,
            payload_digest: Digest::of(&payload),
            blocks_bound: 60,
            privacy: PrivacyClaimV1 {
                clip_norm: L2Norm::new(588.0)?,
                noise_multiplier: NoiseMultiplier::new(1.27)?,
                epsilon_spent: Epsilon::new(1.0)?,
                delta: Delta::new(1e-6)?,
                ledger_head: Digest::of(b"ledger"),
                ledger_records: 3,
            },
        },
        payload.clone(),
    );
    let encoded = encode_to_aggregator(&message)?;
    let header = FrameHeader::parse(encoded.head[..HEADER_BYTES].try_into()?, u32::MAX)?;
    let mut body = BytesMut::from(&encoded.head[HEADER_BYTES..]);
    body.extend_from_slice(&encoded.payload);
    let body = body.freeze();

    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Bytes(body.len() as u64));
    group.bench_function("encode update", |bencher| {
        bencher.iter(|| encode_to_aggregator(black_box(&message)));
    });
    group.bench_function("decode update", |bencher| {
        bencher.iter(|| decode_to_aggregator(header.kind, black_box(body.clone())));
    });
    group.throughput(Throughput::Elements(u64::from(DIMENSION)));
    group.bench_function("compress to int8", |bencher| {
        bencher.iter(|| encode_int8(black_box(&values), || numbers.draw()));
    });
    group.bench_function("scan int8", |bencher| {
        bencher.iter(|| scan(encoding, black_box(&payload)));
    });
    let mut decoded = vec![0.0; values.len()];
    group.bench_function("decode int8", |bencher| {
        bencher.iter(|| decode_range(encoding, black_box(&payload), 0, &mut decoded));
    });
    group.finish();
    criterion.final_summary();
    Ok(())
}
