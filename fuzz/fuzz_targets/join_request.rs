//! What anyone may say to the join listener, with no certificate at all. What decodes is written back as it was read.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use theriac_protocol::codec::{decode_join_request, encode_join_request};
use theriac_protocol::frame::{HEADER_BYTES, kind};

fuzz_target!(|body: &[u8]| {
    if let Ok(request) = decode_join_request(kind::JOIN_REQUEST_V1, Bytes::copy_from_slice(body)) {
        assert!(request.csr.len() <= 4096);
        let encoded = encode_join_request(&request).expect("what was decoded keeps the limits");
        assert_eq!(&encoded.head[HEADER_BYTES..], body);
    }
});
