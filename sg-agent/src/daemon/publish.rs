//! Published ports: from those that are wanted to the proxy's listeners and the programs that judge clients early. Owns
//! which are wanted, and what is wrong with them; serves nobody.

use super::Daemon;
use crate::early;
use crate::model::{InstanceId, Warning};
use crate::proxy;

impl Daemon {
    /// From the ports that are wanted to those that are open.
    pub(super) async fn publish(&mut self) {
        self.take_launched();
        let wanted = self.published();
        self.proxy_warnings = self.proxy.reconcile(wanted).await;
        self.proxy_warnings.extend(self.unattached());
        let early = tokio::task::block_in_place(|| self.drop_early());
        self.proxy_warnings.extend(early);
        self.tell();
    }

    /// Has programs judge clients of published ports before their handshake, at the sockets that are open now.
    fn drop_early(&mut self) -> Vec<Warning> {
        let (host, mut listening) = (&self.view.discovered.host_links, self.proxy.listening());
        // Whose packets come from a balancer only its header tells.
        listening.retain(|socket| !self.trusts_balancers || socket.published.transport == proxy::Transport::Udp);
        let (links, mut warnings) = self.early_drop.links(host, &listening);
        self.early_is_stale = *self.freshness.borrow();
        let published = if self.early_is_stale {
            // Who comes while rules are stale has them read anew, which takes the proxy.
            self.applier.pause()
        } else {
            let sockets = early::sockets(&listening, host, &self.applier.snapshot(), self.deny);
            self.applier.publish(&sockets)
        };
        if let Err(error) = published {
            let problem = format!("denied clients are reset after their handshake: {error}");
            warnings.push(Warning { subject: "published ports".into(), problem });
        }
        warnings.extend(self.applier.watch(&links));
        warnings
    }

    /// The ports that flags, containers and the launcher publish.
    fn published(&self) -> Vec<proxy::Published> {
        let by_label = self.view.discovered.attachments.iter().flat_map(|attachment| {
            attachment.publish.iter().map(|port| proxy::PublishSpec {
                instance: attachment.instance.clone(),
                bind: None,
                host_port: port.host_port,
                port: port.port,
                transport: port.transport,
            })
        });
        let launched = self.launched.iter().flat_map(|launched| launched.ports.iter().cloned());
        self.flags.iter().cloned().chain(by_label).chain(launched).map(proxy::Published::from).collect()
    }

    /// Published ports of instances that aren't attached here: every client is refused.
    fn unattached(&self) -> Vec<Warning> {
        let attached = |instance: &InstanceId| self.view.discovered.attachments.iter().any(|a| a.instance == *instance);
        let missing = self.flags.iter().filter(|port| !attached(&port.instance));
        let warn = |port: &proxy::PublishSpec| Warning {
            subject: port.instance.to_string(),
            problem: format!("is not attached here: clients of host port {} are refused until it is", port.host_port),
        };
        missing.map(warn).collect()
    }
}
