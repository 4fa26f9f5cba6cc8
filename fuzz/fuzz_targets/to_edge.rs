//! Every kind that an aggregator may send, and every kind that it may not: an edge trusts nothing either. What decodes is
//! written back as it was read.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use theriac_protocol::codec::{decode_to_edge, encode_to_edge};
use theriac_protocol::frame::HEADER_BYTES;

fuzz_target!(|input: (u16, &[u8])| {
    let (number, body) = input;
    // Half of the inputs choose one of the known kinds instead of hitting one by luck.
    let kind = if number & 1 == 0 { 0x8101 + ((number >> 1) % 12) * 0x0100 } else { number };
    let Ok(message) = decode_to_edge(kind, Bytes::copy_from_slice(body)) else { return };
    let encoded = encode_to_edge(&message).expect("what was decoded keeps the limits");
    assert_eq!([&encoded.head[HEADER_BYTES..], &encoded.payload].concat(), body);
});
