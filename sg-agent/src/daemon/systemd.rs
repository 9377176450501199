//! What systemd hears of the agent: that it is up, that it isn't stuck, that it ends.

pub(super) use sd_notify::NotifyState;

/// Tells systemd, if this is its service of `Type=notify`, how the agent's one task is.
pub(super) fn tell(state: &NotifyState) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        tracing::debug!(%error, "systemd is not told");
    }
}
