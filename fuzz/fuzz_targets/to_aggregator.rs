//! Every kind that an edge may send, and every kind that it may not. What decodes is written back as it was read; an
//! update's payload is scanned and unpacked as validation does it.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use theriac_protocol::codec::{decode_to_aggregator, encode_to_aggregator};
use theriac_protocol::compress::{decode_range, payload_len, scan};
use theriac_protocol::frame::HEADER_BYTES;
use theriac_protocol::message::ToAggregator;

fuzz_target!(|input: (u16, &[u8])| {
    let (number, body) = input;
    // Half of the inputs choose one of the known kinds instead of hitting one by luck.
    let kind = if number & 1 == 0 { 0x0101 + ((number >> 1) % 11) * 0x0100 } else { number };
    let Ok(message) = decode_to_aggregator(kind, Bytes::copy_from_slice(body)) else { return };
    let encoded = encode_to_aggregator(&message).expect("what was decoded keeps the limits");
    assert_eq!([&encoded.head[HEADER_BYTES..], &encoded.payload].concat(), body);
    if let ToAggregator::Update(header, payload) = message
        && payload_len(header.encoding, header.values) == Some(payload.len())
        && let Ok(seen) = scan(header.encoding, &payload)
    {
        assert!(seen.norm.is_finite());
        let mut tile = [0.0; 64];
        for start in (0..header.values as usize).step_by(tile.len()) {
            let values = tile.len().min(header.values as usize - start);
            decode_range(header.encoding, &payload, start, &mut tile[..values]);
            assert!(tile[..values].iter().all(|value| value.is_finite()));
        }
    }
});
