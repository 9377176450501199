//! When to look again. Owns the subscriptions and their pace; looks at nothing itself.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc};
use tokio::time::{self, Instant, MissedTickBehavior};
use tracing::{debug, info};

use super::{DiscoveryError, Options, docker};

/// The least time between two triggers: a container that flaps its addresses must not keep the agent busy.
const PACE: Duration = Duration::from_millis(50);
/// The first and the longest pause before Docker is asked again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A stream of events that held so long was a healthy one.
const HEALTHY: Duration = Duration::from_secs(10);

/// Sends to `tx` whenever a scan may find something new, at once for the first event and then no more often than twenty
/// times a second. Events are coalesced: give `tx` room for one. Ends when `tx` is closed.
///
/// It hears of containers that start, stop, are renamed or change networks; of links and addresses in this network
/// namespace, and in those that a link of this one leads to (if it may listen to them: CAP_NET_BROADCAST). Events that
/// the kernel couldn't deliver are a trigger too. What nobody tells, such as an address that changes in a namespace
/// further away, [`Options::rescan`] covers.
///
/// # Errors
/// If the kernel's link events can't be subscribed to. Docker that goes away is none: it is told once, and asked
/// again until it is back.
pub async fn watch(options: &Options, tx: mpsc::Sender<()>) -> Result<(), DiscoveryError> {
    let failed = |cause| DiscoveryError::Kernel { action: "listen to link events", cause };
    let socket = subscribe().map_err(failed)?;
    let notify = Notify::new();
    tokio::select! {
        error = link_events(&socket, &notify) => Err(failed(error)),
        () = docker_events(options, &notify), if options.docker => Ok(()),
        () = rescan(options.rescan, &notify) => Ok(()),
        () = pass_on(&notify, &tx) => Ok(()),
    }
}

/// From any number of notifications to a trigger now and then.
async fn pass_on(notify: &Notify, tx: &mpsc::Sender<()>) {
    loop {
        tokio::select! {
            () = notify.notified() => {}
            () = tx.closed() => return,
        }
        // If the last trigger hasn't been taken yet, it stands for this one too.
        if let Err(mpsc::error::TrySendError::Closed(())) = tx.try_send(()) {
            return;
        }
        time::sleep(PACE).await;
    }
}

async fn rescan(every: Duration, notify: &Notify) {
    let mut ticks = time::interval_at(Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        notify.notify_one();
    }
}

fn subscribe() -> io::Result<AsyncFd<Socket>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    for group in [libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR] {
        socket.add_membership(group)?;
    }
    if let Err(error) = socket.set_listen_all_namespaces(true) {
        info!(%error, "can't hear of address changes inside containers at once; they are found by the next rescan");
    }
    socket.set_non_blocking(true)?;
    // SAFETY: the socket owns its descriptor, and neither closes nor replaces it before it is dropped by the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

/// Ends only if the socket breaks.
async fn link_events(socket: &AsyncFd<Socket>, notify: &Notify) -> io::Error {
    let mut buffer = Vec::with_capacity(64 * 1024);
    loop {
        let mut ready = match socket.readable().await {
            Ok(ready) => ready,
            Err(error) => return error,
        };
        buffer.clear();
        match ready.try_io(|socket| socket.get_ref().recv(&mut buffer, 0)) {
            Ok(Ok(_)) => notify.notify_one(),
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                debug!(socket = socket.get_ref().as_raw_fd(), "link events were lost: a scan finds what they told");
                notify.notify_one();
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return error,
            Err(_would_block) => {}
        }
    }
}

/// Never ends.
async fn docker_events(options: &Options, notify: &Notify) {
    let (mut pause, mut away) = (BACK_OFF.0, false);
    loop {
        let started = Instant::now();
        let (endpoint, cause) = listen(options, notify, &mut away).await;
        if !away {
            away = true;
            debug!(endpoint, cause, "docker doesn't answer");
            notify.notify_one();
        }
        if started.elapsed() >= HEALTHY {
            pause = BACK_OFF.0;
        }
        time::sleep(pause).await;
        pause = (pause * 2).min(BACK_OFF.1);
    }
}

/// Passes on Docker's events until they end; then where, and why.
async fn listen(options: &Options, notify: &Notify, away: &mut bool) -> (String, String) {
    // Events since before the connection are repeated, so none falls between the scan that this triggers and the
    // subscription.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().saturating_sub(1);
    let (docker, endpoint) = match docker::connect(options.docker_host.as_deref()).await {
        Ok(connected) => connected,
        Err(failure) => return (failure.endpoint, failure.cause.to_string()),
    };
    if std::mem::take(away) {
        info!(endpoint, "docker answers again");
    }
    notify.notify_one();
    let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
    let filters = [
        ("type".to_owned(), list(&["container", "network"])),
        ("event".to_owned(), list(&["start", "die", "rename", "connect", "disconnect"])),
    ];
    let request = EventsOptionsBuilder::new().since(&since.to_string()).filters(&filters.into()).build();
    let mut events = std::pin::pin!(docker.events(Some(request)));
    loop {
        match events.next().await {
            Some(Ok(_)) => notify.notify_one(),
            Some(Err(error)) => return (endpoint, error.to_string()),
            None => return (endpoint, "it closed the stream of events".to_owned()),
        }
    }
}
