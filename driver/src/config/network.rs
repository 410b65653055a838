//! Checks of the options that say where a plain task is in a network.

use std::{collections::BTreeMap, net::IpAddr, str::FromStr};

use super::{
    Error,
    value::{self, Number, refused, text},
};

pub(super) fn addresses(field: &str, given: Option<Vec<String>>) -> Result<Vec<String>, Error> {
    let given = given.unwrap_or_default();
    match given
        .iter()
        .find(|address| address.parse::<IpAddr>().is_err())
    {
        Some(wrong) => Err(refused(field, wrong, "must be an IP address")),
        None => Ok(given),
    }
}

pub(super) fn extra_hosts(given: Option<Vec<String>>) -> Result<Vec<String>, Error> {
    let given = given.unwrap_or_default();
    let wrong = given.iter().find(|entry| {
        let address = entry.split_once(':').map(|(name, address)| (name.is_empty(), address));
        let is_name = entry
            .split(':')
            .next()
            .is_some_and(|name| name.chars().all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter)));
        !is_name || !matches!(address, Some((false, address))
            if address == "host-gateway" || address.trim_matches(['[', ']']).parse::<IpAddr>().is_ok())
    });
    match wrong {
        Some(wrong) => Err(refused("extra_hosts", wrong, "must be `name:address`")),
        None => Ok(given),
    }
}

/// An address of one family.
pub(super) fn address<T: FromStr>(field: &str, given: Option<String>) -> Result<Option<T>, Error> {
    let Some(given) = text(given) else {
        return Ok(None);
    };
    let family = if field == "ipv6_address" { 6 } else { 4 };
    let parsed = given.parse().map(Some);
    parsed.map_err(|_| refused(field, given, format!("must be an IPv{family} address")))
}

/// Six bytes in hexadecimal.
pub(super) fn mac_address(given: Option<String>) -> Result<Option<String>, Error> {
    let Some(given) = text(given) else {
        return Ok(None);
    };
    let is_byte = |part: &str| part.len() == 2 && u8::from_str_radix(part, 16).is_ok();
    let parts = given.split([':', '-']);
    if parts.clone().count() == 6 && parts.clone().all(is_byte) {
        return Ok(Some(parts.collect::<Vec<_>>().join(":")));
    }
    let allowed = "must be six bytes such as `02:42:ac:11:00:02`";
    Err(refused("mac_address", given, allowed))
}

/// The ports inside, by label; later ones have precedence.
pub(super) fn port_map(
    given: Option<Vec<BTreeMap<String, Number>>>,
) -> Result<BTreeMap<String, u16>, Error> {
    let ports = given.into_iter().flatten().flatten();
    let port = |(label, number)| {
        let field = format!("port_map.{label}");
        let port = value::whole(&field, Some(number), 1, i64::from(u16::MAX))?;
        let port = port.and_then(|port| u16::try_from(port).ok());
        Ok((label, port.expect("it is between two u16")))
    };
    ports.map(port).collect()
}
