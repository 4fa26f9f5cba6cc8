//! The first bytes of any stream: the frame header. What parses is within its limit and is written back as it was read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES};

fuzz_target!(|input: ([u8; HEADER_BYTES], u32)| {
    let (bytes, length_max) = input;
    match FrameHeader::parse(&bytes, length_max) {
        Ok(header) => {
            assert!(header.length <= length_max);
            assert_eq!(header.encode(), bytes);
        }
        Err(error) => {
            error.refusal_code();
        }
    }
});
