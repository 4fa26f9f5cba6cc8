//! What keeps a program from starting: each time an exit code that a script can act on, and a message that says what to do.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use theriac_certs::authority::Validity;
use theriac_certs::{Authority, Role};

use crate::child::{free_address, run, text};
use crate::fleet::{Centre, Edge};

fn centre(root: &Path) -> Centre {
    Centre::init(root, "[rounds]\nquorum = 3\n")
}

#[test]
fn a_misspelt_key_is_named_with_the_right_one() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::new(root.path(), "press-1", "[detektion]\nwarm_up_rows = 60\n");
    let words = ["TH-E0301", "detektion", "did you mean `detection`?"];
    edge.run(&["run"]).expect_problem(78, &words);
    edge.run(&["check-config"]).expect_problem(78, &words);
    edge.run(&["join", "--aggregator", "127.0.0.1:1", "--token", "thrc1_x"])
        .expect_problem(78, &words);
    assert!(
        !edge.dir.exists(),
        "a state directory was made for a configuration that does not load"
    );

    let centre = centre(root.path());
    centre.configure("[rounds]\nquorom = 3\n");
    let words = ["TH-E0701", "quorom", "did you mean `quorum`?"];
    centre.run(&["serve"]).expect_problem(78, &words);
    centre.run(&["check-config"]).expect_problem(78, &words);
}

#[test]
fn a_value_out_of_range_is_named_with_its_key() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::new(root.path(), "press-1", "[[service]]\nname = \"kv\"\nargv = []\n");
    edge.run(&["run"])
        .expect_problem(78, &["TH-E0302", "service `kv`, argv", "name the program"]);
    let centre = centre(root.path());
    centre.configure("[rounds]\nquorum = 0\n");
    centre
        .run(&["serve"])
        .expect_problem(78, &["TH-E0701", "rounds.quorum", "0"]);
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::new(root.path(), "press-1", "");
    let held = TcpListener::bind(edge.page).unwrap();
    edge.run(&["run"])
        .expect_problem(75, &["TH-E0306", &edge.page.to_string(), "http.listen"]);
    drop(held);

    let centre = centre(root.path());
    let port = |words: &[&str]| {
        centre.run(&["serve"]).expect_problem(75, words);
    };
    for address in [centre.listen, centre.join] {
        let held = UdpSocket::bind(address).unwrap();
        port(&["TH-E0707", &address.to_string(), "choose a free one"]);
        drop(held);
    }
    let held = TcpListener::bind(centre.page).unwrap();
    port(&["TH-E0707", &centre.page.to_string(), "choose a free one"]);
    drop(held);
}

#[test]
fn a_second_process_on_one_directory_is_refused_with_the_first_ones_id() {
    let root = tempfile::tempdir().unwrap();
    let mut edge = Edge::new(root.path(), "press-1", "");
    edge.start();
    let mut other = Edge::new(root.path(), "press-1", "");
    other.page = free_address();
    let first = format!("process {}", edge.pid());
    other
        .run(&["run"])
        .expect_problem(75, &["TH-E0304", &first, "state_dir of its own"]);
    edge.stop();

    let mut centre = centre(root.path());
    centre.serve();
    let first = format!("process {}", centre.pid());
    // With other ports, so that only the directory is in the way.
    let text = fs::read_to_string(centre.config()).unwrap();
    let mut changed = text.clone();
    for address in [centre.listen, centre.join, centre.page] {
        changed = changed.replace(&address.to_string(), &free_address().to_string());
    }
    fs::write(centre.config(), changed).unwrap();
    centre
        .run(&["serve"])
        .expect_problem(75, &["TH-E0703", &first, "two aggregators on one directory"]);
    fs::write(centre.config(), text).unwrap();
    centre.stop();
}

#[test]
fn a_directory_that_is_none_of_ours_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::new(root.path(), "press-1", "");
    fs::create_dir(&edge.dir).unwrap();
    fs::set_permissions(&edge.dir, fs::Permissions::from_mode(0o755)).unwrap();
    edge.run(&["run"])
        .expect_problem(78, &["TH-E0303", "0755", "chmod 700"]);

    let centre = centre(root.path());
    let moved = root.path().join("elsewhere");
    fs::create_dir(&moved).unwrap();
    let config = moved.join("aggregator.toml");
    fs::copy(centre.config(), &config).unwrap();
    run("aggregator", &["serve", "--config", text(&config)]).expect_problem(
        78,
        &["TH-E0702", "aggregator.db is missing", "theriac-aggregator init"],
    );
}

/// The aggregator's own key and certificate.
#[test]
fn an_aggregator_without_a_good_identity_does_not_start() {
    let root = tempfile::tempdir().unwrap();
    let centre = centre(root.path());
    let path = centre.dir.join("identity/aggregator.pem");
    let good = fs::read(&path).unwrap();
    let refused = |words: &[&str]| {
        centre
            .run(&["serve"])
            .expect_problem(78, &[&["TH-E0705"], words].concat());
    };

    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    refused(&["identity/aggregator.pem", "0644", "chmod 600"]);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();

    fs::write(&path, b"-----BEGIN PRIVATE KEY-----\ngarbage").unwrap();
    refused(&["identity/aggregator.pem", "unreadable", "backup"]);
    fs::write(&path, &good[..good.len() - 400]).unwrap();
    refused(&["identity/aggregator.pem", "backup"]);
    fs::remove_file(&path).unwrap();
    refused(&["identity/aggregator.pem", "No such file"]);

    // This host's clock is behind: the certificate's time has not come.
    let authority = Authority::load(&centre.dir.join("authority/aggregators")).unwrap();
    let from = SystemTime::now() + Duration::from_hours(24);
    let early = authority
        .issue(
            &"main".parse().unwrap(),
            &["127.0.0.1".to_owned()],
            Validity {
                not_before: from,
                not_after: from + Duration::from_hours(24 * 30),
            },
        )
        .unwrap();
    early.save(&centre.dir.join("identity"), "aggregator").unwrap();
    refused(&["is valid from", "clock is probably behind: set it"]);

    // The authority of edges: another role's certificate under its name.
    fs::write(&path, &good).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let other = Authority::generate("plant", Role::Edge, SystemTime::now()).unwrap();
    let edges = centre.dir.join("authority/edges");
    let kept = root.path().join("kept");
    fs::rename(&edges, &kept).unwrap();
    fs::create_dir(&edges).unwrap();
    refused(&["authority/edges"]);
    other.save(&edges).unwrap();
    fs::write(edges.join("authority.pem"), b"garbage").unwrap();
    refused(&["authority/edges", "unreadable"]);
    fs::remove_dir_all(&edges).unwrap();
    fs::rename(&kept, &edges).unwrap();
    let mut centre = centre;
    centre.serve();
    centre.stop();
}
