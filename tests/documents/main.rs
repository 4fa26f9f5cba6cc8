//! The documents against the code: what is written must exist, and what exists must be written.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a file that cannot be read is a failure"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The workspace's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every `TH-E` and four digits in `text`.
fn codes(text: &str) -> BTreeSet<String> {
    text.match_indices("TH-E")
        .filter_map(|(at, _)| text.get(at..at + 8))
        .filter(|code| code[4..].bytes().all(|byte| byte.is_ascii_digit()))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_error_code_is_documented_and_every_documented_one_exists() {
    let mut files = Vec::new();
    for program in ["edge", "aggregator", "lab"] {
        sources(&root().join(program).join("src"), &mut files);
    }
    let mut used = BTreeSet::new();
    for file in files {
        used.extend(codes(&fs::read_to_string(file).unwrap()));
    }
    let documented = codes(&fs::read_to_string(root().join("docs/errors.md")).unwrap());
    assert_eq!(
        used.difference(&documented).collect::<Vec<_>>(),
        Vec::<&String>::new(),
        "not in docs/errors.md"
    );
    assert_eq!(
        documented.difference(&used).collect::<Vec<_>>(),
        Vec::<&String>::new(),
        "in no program"
    );
}

#[test]
fn every_page_that_a_page_links_to_exists() {
    let mut pages: Vec<PathBuf> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
    ]
    .iter()
    .map(|page| root().join(page))
    .collect();
    pages.extend(
        fs::read_dir(root().join("docs"))
            .unwrap()
            .map(|entry| entry.unwrap().path()),
    );
    for page in pages
        .iter()
        .filter(|page| page.extension().is_some_and(|extension| extension == "md"))
    {
        let text = fs::read_to_string(page).unwrap();
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            let file = target.split('#').next().unwrap();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let linked = page.parent().unwrap().join(file);
            assert!(
                linked.exists(),
                "{} links to {target}, which is not there",
                page.display()
            );
        }
    }
}

/// The fenced `toml` block of a page whose first line holds `title`.
fn block(page: &str, title: &str) -> String {
    let text = fs::read_to_string(root().join(page)).unwrap();
    let found = text
        .split("```toml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap());
    found
        .into_iter()
        .find(|block| block.lines().next().unwrap().contains(title))
        .unwrap()
        .to_owned()
}

#[test]
fn the_configuration_in_the_readme_is_one_that_the_edge_takes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("edge.toml");
    fs::write(&file, block("README.md", "edge.toml")).unwrap();
    let state = ("THERIAC__STATE_DIR".to_owned(), dir.path().display().to_string());
    let config = theriac_edge::config::EdgeConfig::load(Some(&file), [state]);
    assert!(config.is_ok(), "{:?}", config.err());
}

#[test]
fn the_changelog_and_the_manifest_agree_on_the_version() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let changelog = fs::read_to_string(root().join("CHANGELOG.md")).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    assert!(manifest.contains(&format!("version = \"{version}\"")));
    assert!(
        changelog.contains("## Unreleased") || changelog.contains(&format!("## {version}")),
        "version {version} is not in the changelog"
    );
}
