//! The status as metrics (OpenMetrics 1.0), for `--metrics`. Pure: `daemon/scrape.rs` listens.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::apply::Usage;
use crate::gateway::GatewayStatus;
use crate::proxy::PortCounters;
use crate::status::{Counter, InterfaceStatus, SourceStatus, Status};

/// What the text is, for HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Names and their values; the library escapes the values.
type Labels = Vec<(&'static str, String)>;

/// The status as text.
pub fn text(status: Status) -> String {
    let mut registry = Registry::with_prefix("sg_agent");
    registry.register_collector(Box::new(Figures(status)));
    let mut text = String::new();
    text::encode(&mut text, &registry).expect("writing into a string does not fail");
    text
}

#[derive(Debug)]
struct Figures(Status);

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut page = Page(encoder);
        agent(&mut page, &self.0)?;
        sources(&mut page, &self.0.sources)?;
        tables(&mut page, &self.0)?;
        interfaces(&mut page, &self.0.interfaces)?;
        published(&mut page, &self.0.published)?;
        self.0.gateway.as_ref().map_or(Ok(()), |status| gateway(&mut page, status))
    }
}

/// The metrics in the order in which they are written.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    /// A metric of several subjects. One of none is left out.
    fn family<M>(&mut self, name: &str, help: &str, metrics: impl IntoIterator<Item = (Labels, M)>) -> fmt::Result
    where
        M: EncodeMetric + TypedMetric,
    {
        let mut metrics = metrics.into_iter().peekable();
        if metrics.peek().is_none() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(name, help, None, M::TYPE)?;
        for (labels, metric) in metrics {
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = ConstGauge::new(value);
        metric.encode(self.0.encode_descriptor(name, help, None, metric.metric_type())?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = ConstCounter::new(value);
        metric.encode(self.0.encode_descriptor(name, help, None, metric.metric_type())?)
    }
}

fn agent(page: &mut Page, status: &Status) -> fmt::Result {
    let version = vec![("version", status.version.clone())];
    page.family("build_info", "The agent's version", [(version, ConstGauge::new(1_u64))])?;
    page.gauge("enforced", "1 if what is desired is enforced", status.enforced.into())?;
    page.gauge("problems", "What stands in the way, if it isn't", status.problems.len() as u64)?;
    page.gauge("warnings", "What is enforced otherwise than expected", status.warnings.len() as u64)?;
    page.counter("commits", "Changes of what is enforced", status.generation)?;
    page.counter("refused_changes", "Changes that were refused whole", status.refused_changes)?;
    page.counter("lost_log_lines", "Lines of the drop log that there was no room for", status.lost_log_lines)?;
    let repairs = status.repairs.iter();
    page.family(
        "repairs",
        "What somebody else had changed in the kernel and was put right",
        repairs.map(|(kind, &count)| (vec![("kind", kind.clone())], ConstCounter::new(count))),
    )
}

fn sources(page: &mut Page, sources: &[SourceStatus]) -> fmt::Result {
    let labels = |source: &SourceStatus| {
        let scope = [("account", source.account.clone()), ("region", source.region.clone())];
        [vec![("source", source.source.clone())], scope.to_vec()].concat()
    };
    let up = sources.iter().map(|source| {
        let is_up = source.error.is_none() && source.age_seconds.is_some();
        (labels(source), ConstGauge::new(u64::from(is_up)))
    });
    page.family("source_up", "1 if the last read succeeded", up)?;
    let ages = sources.iter().filter_map(|source| Some((labels(source), ConstGauge::new(source.age_seconds?))));
    page.family("source_age_seconds", "Time since the last read that succeeded", ages)
}

fn tables(page: &mut Page, status: &Status) -> fmt::Result {
    let by_table = |usage: &Usage| {
        [("policies", usage.policies), ("references", usage.references), ("lines", usage.lines)]
            .map(|(table, entries)| (vec![("table", table.to_owned())], ConstGauge::new(u64::from(entries))))
    };
    page.family("table_entries", "What the rule maps hold", by_table(&status.usage))?;
    page.family("table_capacity", "What they could hold", by_table(&status.capacity))?;
    page.gauge(
        "conntrack_available",
        "Flows of all interfaces that can still be tracked",
        status.conntrack_allowance_available.into(),
    )?;
    page.gauge("published_connections", "Open connections", status.published_connections as u64)?;
    page.gauge("published_connections_limit", "How many there can be", status.published_connections_limit as u64)
}

fn interfaces(page: &mut Page, interfaces: &[InterfaceStatus]) -> fmt::Result {
    let labels = |interface: &InterfaceStatus| {
        let eni = interface.eni.clone().unwrap_or_default();
        vec![("instance", interface.instance.clone()), ("eni", eni), ("link", interface.link.clone())]
    };
    let attached = |interface: &InterfaceStatus| (labels(interface), ConstGauge::new(u64::from(interface.attached)));
    page.family("interface_attached", "1 if the programs are on the link", interfaces.iter().map(attached))?;
    let available = |interface: &InterfaceStatus| {
        (labels(interface), ConstGauge::new(u64::from(interface.conntrack_allowance_available)))
    };
    page.family(
        "conntrack_allowance_available",
        "Flows of the interface that can still be tracked (ENA's name)",
        interfaces.iter().map(available),
    )?;
    let counted = |figure: fn(&Counter) -> u64| {
        interfaces.iter().flat_map(move |interface| {
            let own = labels(interface);
            let directions = interface.counters.iter();
            let reasons = directions
                .flat_map(|(direction, reasons)| reasons.iter().map(move |(reason, count)| (direction, reason, count)));
            reasons.map(move |(direction, reason, count)| {
                let verdict = [("direction", direction.clone()), ("reason", reason.clone())];
                ([own.clone(), verdict.to_vec()].concat(), ConstCounter::new(figure(count)))
            })
        })
    };
    page.family("packets", "Judged packets by what became of them", counted(|count| count.packets))?;
    page.family("bytes", "Their bytes", counted(|count| count.bytes))
}

fn published(page: &mut Page, ports: &[PortCounters]) -> fmt::Result {
    let labels = |port: &PortCounters, more: &[(&'static str, &str)]| {
        let own = vec![
            ("instance", port.instance.clone()),
            ("address", port.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
            ("host_port", port.host_port.to_string()),
            ("protocol", port.protocol.clone()),
        ];
        let more = more.iter().map(|&(name, value)| (name, value.to_owned()));
        own.into_iter().chain(more).collect::<Labels>()
    };
    let outcomes = ports.iter().flat_map(|port| {
        let by_outcome = [
            ("accepted", port.accepted),
            ("refused", port.refused),
            ("unintroduced", port.unintroduced),
            ("failed", port.failed),
            ("cut", port.cut),
        ];
        by_outcome.map(|(outcome, count)| (labels(port, &[("outcome", outcome)]), ConstCounter::new(count)))
    });
    page.family("port_connections", "Connections to published ports by what became of them", outcomes)?;
    let early = ports.iter().map(|port| (labels(port, &[]), ConstCounter::new(port.denied_early)));
    page.family("port_packets_denied_early", "Packets that were denied before the proxy heard of them", early)?;
    let active = ports.iter().map(|port| (labels(port, &[]), ConstGauge::new(port.active)));
    page.family("port_connections_active", "Connections that are open now", active)?;
    let bytes = ports.iter().flat_map(|port| {
        [("instance", port.bytes_to_instance), ("clients", port.bytes_to_clients)]
            .map(|(to, count)| (labels(port, &[("to", to)]), ConstCounter::new(count)))
    });
    page.family("port_bytes", "Bytes through published ports", bytes)
}

fn gateway(page: &mut Page, status: &GatewayStatus) -> fmt::Result {
    page.counter("gateway_requests", "Requests that were forwarded", status.requests)?;
    page.counter("gateway_unanswered", "Requests that the endpoint didn't answer", status.unanswered)?;
    let by_outcome = [("committed", status.committed), ("failed", status.failed), ("late", status.late)];
    let outcomes = by_outcome.map(|(outcome, count)| (vec![("outcome", outcome.to_owned())], ConstCounter::new(count)));
    page.family("gateway_changes", "Changes by whether they were enforced when their answer went out", outcomes)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn status() -> Status {
        let counters = BTreeMap::from([("no_rule".to_owned(), Counter { packets: 3, bytes: 180 })]);
        Status {
            version: "1.2.3".into(),
            pid: 7,
            generation: 5,
            enforced: false,
            problems: vec!["one".into()],
            sources: vec![SourceStatus {
                source: "http://127.0.0.1:5000".into(),
                account: "1".into(),
                region: "us-east-1".into(),
                age_seconds: Some(0.5),
                error: None,
            }],
            interfaces: vec![InterfaceStatus {
                instance: "i-\"1\n".into(),
                eni: None,
                account: "1".into(),
                region: "us-east-1".into(),
                link: "veth1".into(),
                ifindex: 3,
                attached: true,
                mac: String::new(),
                addresses: vec![],
                groups: vec![],
                policy: "groups".into(),
                policy_number: 1,
                epoch: 1,
                ingress_rules: 0,
                egress_rules: 0,
                network_acl: None,
                conntrack_allowance_available: 9,
                counters: BTreeMap::from([("ingress".to_owned(), counters)]),
            }],
            published: vec![PortCounters { instance: "i-1".into(), ..PortCounters::default() }],
            gateway: Some(GatewayStatus::default()),
            published_connections: 0,
            published_connections_limit: 10,
            usage: Usage::default(),
            capacity: Usage::CAPACITY,
            refused_changes: 2,
            conntrack_allowance_available: 11,
            repairs: BTreeMap::from([("map_altered".to_owned(), 4)]),
            lost_log_lines: 5,
            warnings: vec![],
        }
    }

    #[test]
    fn figures_have_their_subjects() {
        let text = text(status());
        for line in [
            "sg_agent_build_info{version=\"1.2.3\"} 1",
            "sg_agent_enforced 0",
            "sg_agent_refused_changes_total 2",
            "sg_agent_repairs_total{kind=\"map_altered\"} 4",
            "sg_agent_lost_log_lines_total 5",
            "sg_agent_source_up{source=\"http://127.0.0.1:5000\",account=\"1\",region=\"us-east-1\"} 1",
            "sg_agent_conntrack_allowance_available{instance=\"i-\\\"1\\n\",eni=\"\",link=\"veth1\"} 9",
            "# EOF",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in {text}");
        }
        let packets = "direction=\"ingress\",reason=\"no_rule\"} 3";
        assert!(
            text.lines().any(|line| line.starts_with("sg_agent_packets_total{") && line.ends_with(packets)),
            "{text}"
        );
    }

    #[test]
    fn the_documentation_has_every_metric_and_no_other() {
        let page = include_str!("../../docs/metrics.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
        let named = rows.flat_map(|row| row.split(" | ").next().unwrap_or_default().split([',', '`', ' ']));
        let named: BTreeSet<&str> = named.filter(|name| !name.is_empty()).collect();
        let text = text(status());
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let served: BTreeSet<&str> = samples.filter_map(|line| line.split([' ', '{']).next()).collect();
        assert_eq!(named, served);
    }

    #[test]
    fn what_there_is_none_of_is_left_out() {
        let text = text(Status { published: vec![], gateway: None, ..status() });
        assert!(!text.contains("sg_agent_gateway") && !text.contains("sg_agent_port_"), "{text}");
    }
}
