//! The bytes of every struct, kept in `golden/`: one file for each struct and version, whole frames one after another.
//!
//! A difference means that builds in the field would no longer understand this one. Do not bless it: add a struct with the next version.
//! Files of a *new* struct are written by `THERIAC_BLESS=1 cargo test -p theriac-protocol --test codec`, which never
//! overwrites one that is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES};

use crate::samples::{self, Message};

#[test]
fn every_struct_is_written_to_and_read_from_the_bytes_of_its_golden_file() {
    for (name, messages) in samples::all() {
        let path = folder().join(format!("{name}.bin"));
        let bytes: Vec<u8> = messages
            .iter()
            .flat_map(|message| {
                let encoded = message.encode().unwrap();
                [encoded.head, encoded.payload].concat()
            })
            .collect();
        if !path.exists() && std::env::var_os("THERIAC_BLESS").is_some_and(|value| value == "1") {
            fs::write(&path, &bytes).unwrap();
        }
        let golden = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let first = bytes
            .iter()
            .zip(&golden)
            .position(|(ours, theirs)| ours != theirs);
        assert!(
            bytes == golden,
            "{name}: {} bytes, golden {}, first difference {first:?}",
            bytes.len(),
            golden.len()
        );
        assert_eq!(decode_frames(golden.into()), messages, "{name}");
    }
}

#[test]
fn no_golden_file_is_without_its_struct() {
    let known: BTreeSet<PathBuf> = samples::all()
        .iter()
        .map(|(name, _)| folder().join(format!("{name}.bin")))
        .collect();
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        assert!(
            known.contains(&path),
            "{}: removing support needs a major version",
            path.display()
        );
    }
}

fn decode_frames(mut bytes: Bytes) -> Vec<Message> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let head = bytes.split_to(HEADER_BYTES);
        let header = FrameHeader::parse(head[..].try_into().unwrap(), u32::MAX).unwrap();
        let body = bytes.split_to(header.length.try_into().unwrap());
        messages.push(Message::decode(header.kind, body).unwrap());
    }
    messages
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}
