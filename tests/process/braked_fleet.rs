//! The fleet's brake and slots with real programs: an aggregator, four edges, services that are stopped and go on.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use theriac_edge::status::{IncidentView, Status};
use theriac_privacy::policy::signed::{PolicyKey, Subject, signature_path};

use crate::child::until;
use crate::fleet::{Centre, Edge, Service, moments};
use crate::page;

/// An edge with one service under a signed policy with budgets of the fleet.
struct Site {
    edge: Edge,
    service: Service,
}

impl Site {
    fn new(root: &Path, centre: &Centre, name: &str, restart: &str) -> Self {
        let own = root.join(name);
        fs::create_dir(&own).unwrap();
        let service = Service::new(&own);
        let policy = own.join("healing.toml");
        let text = format!(
            "version = 1\n[budgets]\nfleet = {{ max_nodes_acting = \"50%\", stop_if_unhealthy_over = \"40%\", report_age = \"10s\", hold_max = \"1h\" }}\n\
             [[service]]\nname = \"kv\"\naction = [{{ id = \"start\", class = \"R2\", autonomy = \"act\" }}{restart}]\n"
        );
        let key = PolicyKey::from_seed(&rand::random());
        fs::write(&policy, &text).unwrap();
        fs::write(
            signature_path(&policy),
            key.sign_text(Subject::Healing, &text).to_string(),
        )
        .unwrap();
        let more = format!(
            "[healing_policy]\nfile = \"{}\"\nkeys = [\"{}\"]\nneed = 1\n{}\n[service.healing]\naction_timeout = \"15s\"\n",
            policy.display(),
            key.public(),
            service.table("1h")
        );
        let mut edge = Edge::new(&own, name, &more);
        // What a busy machine looks like to the detector is not asked here: it has too few rows for all of the test.
        let config = own.join(format!("{name}.toml"));
        let quick = fs::read_to_string(&config).unwrap();
        let slow = quick
            .replace("history_rows = 600\n", "history_rows = 10000\n")
            .replace("warm_up_rows = 60\n", "warm_up_rows = 10000\n");
        assert!(slow.contains("history_rows = 10000") && slow.contains("warm_up_rows = 10000"));
        fs::write(&config, slow).unwrap();
        edge.enrol(centre);
        edge.start();
        let site = Self { edge, service };
        edge_is_well(site)
    }

    /// All its processes are stopped, or go on.
    fn signal(&self, signal: Signal) {
        for pid in self.service.processes() {
            kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
        }
    }

    fn until(&mut self, what: &str, ready: impl Fn(&Status) -> bool) {
        self.edge.until(what, ready);
    }

    fn until_fleet(&mut self, words: &str) {
        self.until(words, |status| {
            status.fleet.as_ref().is_some_and(|fleet| fleet.contains(words))
        });
    }

    /// The latest incident, once it is in this state.
    fn incident(&self, state: &str) -> IncidentView {
        until(&format!("an incident that is {state}"), || {
            let latest = self
                .edge
                .incidents()
                .into_iter()
                .max_by_key(|incident| incident.id);
            latest.filter(|incident| incident.service == "kv" && incident.state == state)
        })
    }
}

fn edge_is_well(mut site: Site) -> Site {
    site.edge.until_connected();
    site.until("a healthy service", |status| {
        status.services.iter().all(|service| service.healthy)
    });
    site
}

fn signal_all(sites: &[Site], signal: Signal) {
    for site in sites {
        site.signal(signal);
    }
}

#[test]
fn a_sick_fleet_holds_a_restart_and_one_that_is_well_or_gone_does_not() {
    const RESTART: &str = ", { id = \"restart\", class = \"R2\", autonomy = \"act\" }";
    const SHARED: &str = ", { id = \"restart\", class = \"R2\", autonomy = \"act\", shared = true }";
    let root = tempfile::tempdir().unwrap();
    let sections = moments("quorum = 9")
        + "[fleet]\nenabled = true\nshare = 50\nlease_ttl = \"63s\"\nstate_age = \"15s\"\n";
    let mut centre = Centre::init(root.path(), &sections);
    centre.serve();
    // Nobody mends the first two; the third needs a slot for it, the fourth does not.
    let site = |name: &str, restart: &str| Site::new(root.path(), &centre, name, restart);
    let sick = [site("press-2", ""), site("press-3", "")];
    let (mut shared, mut plain) = (site("press-4", SHARED), site("press-5", RESTART));
    shared.until_fleet("4 nodes, 0 unhealthy");
    centre.until("slots that are lent", |status| {
        status.fleet.as_ref().is_some_and(|fleet| fleet.lends_in_s == 0)
    });

    signal_all(&sick, Signal::STOP);
    shared
        .until_fleet("4 nodes, 2 unhealthy, 0 others act; held by the fleet: 50 % of 4 nodes are unhealthy");
    shared.signal(Signal::STOP);
    let held = shared.incident("held");
    assert_eq!((held.class.as_str(), held.actions.len()), ("hang", 0));
    let why = shared
        .edge
        .run(&["incidents", "why", &held.id.to_string()])
        .expect_done();
    assert!(why.stdout.contains("held by the fleet: "), "{}", why.stdout);
    shared.until_fleet("3 unhealthy");
    let told = |status: &Status| {
        status.services[0]
            .standing
            .iter()
            .any(|words| words.starts_with("held by the fleet"))
    };
    shared.until("word of what holds it", told);
    let fleet = centre.status().fleet.unwrap();
    assert_eq!((fleet.counts.nodes, fleet.counts.unhealthy), (4, 3));

    // The common cause goes away: one sick node of four is none, and then a slot is lent.
    signal_all(&sick, Signal::CONT);
    let healed = shared.incident("healed");
    assert_eq!(
        (healed.id, healed.actions[0].action.as_str()),
        (held.id, "restart")
    );
    let granted = "theriac_aggregator_fleet_leases_total{outcome=\"granted\"} ";
    let (_, metrics) = page::ask("GET", centre.page, "/metrics", b"").unwrap();
    let metrics = String::from_utf8(metrics).unwrap();
    assert!(metrics.contains(granted), "{metrics}");
    centre.until("the slot to be given back", |status| {
        status
            .fleet
            .as_ref()
            .is_some_and(|fleet| fleet.action_holders.is_empty())
    });

    // Sick again, and then nobody tells of the fleet any more: what was heard last holds for 10 s, and local healing goes on.
    plain.until_fleet("4 nodes, 0 unhealthy");
    signal_all(&sick, Signal::STOP);
    plain.until_fleet("held by the fleet");
    centre.kill();
    plain.signal(Signal::STOP);
    let healed = plain.incident("healed");
    assert_eq!(healed.actions[0].action, "restart");
    plain.until_fleet("it holds nothing back");
    for mut site in sick.into_iter().chain([shared, plain]) {
        site.edge.stop();
    }
}
