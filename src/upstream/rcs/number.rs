//! Whole numbers in any notation that JSON has.

/// Reads a whole number that fits into 64 bits, in any notation of RFC 8259, such as `17`, `17.0`, `1.7e1` or
/// `170E-1`. Zeros before it are allowed too. It is exact: nothing is rounded.
pub(super) fn whole_number(text: &str) -> Option<i64> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (negative, mantissa) =
        mantissa.strip_prefix('-').map_or((false, mantissa), |rest| (true, rest));
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((_, "")) => return None,
        Some(parts) => parts,
        None => (mantissa, ""),
    };
    let is_digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Some(0);
    }
    // The value is `significant` times ten to the power of `power`.
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let power = i64::from(exponent) - i64::try_from(fraction.len()).ok()? + zeros;
    let factor = 10_i64.checked_pow(u32::try_from(power).ok()?)?;
    let number = significant.parse::<i64>().ok()?.checked_mul(factor)?;
    Some(if negative { -number } else { number })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_notation_of_a_whole_number_is_read_and_nothing_is_rounded() {
        for text in [
            "1717138601944",
            "1717138601944.0",
            "1717138601944.000",
            "1.717138601944e12",
            "1.717138601944E+12",
            "17171386019440e-1",
            "1717138601.944e3",
            "0.1717138601944e13",
            "001717138601944",
            "171713860194400000000000000000000000e-23",
        ] {
            assert_eq!(whole_number(text), Some(1_717_138_601_944), "{text}");
        }
        assert_eq!(whole_number("-0"), Some(0));
        assert_eq!(whole_number("0e999999999"), Some(0));
        assert_eq!(whole_number("-17e1"), Some(-170));
        for text in [
            "",
            "-",
            "+1",
            "1.",
            ".1",
            "1.5",
            "1e",
            "e1",
            "1e1.0",
            "1e-1",
            "1,0",
            "1_0",
            "0x10",
            " 1",
            "1 ",
            "--1",
            "1e99999999999",
            "1e999999999",
            "1e19",
            "9223372036854775808",
            "NaN",
            "Infinity",
            "१",
        ] {
            assert_eq!(whole_number(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_number_is_read_however_its_point_is_moved(
            number in -9_007_199_254_740_992_i64..9_007_199_254_740_992, places in 0_usize..30,
        ) {
            let digits = number.unsigned_abs().to_string();
            let padded = format!("{digits:0>width$}", width = places + 1);
            let (whole, fraction) = padded.split_at(padded.len() - places);
            let sign = if number < 0 { "-" } else { "" };
            let point = if places == 0 { "" } else { "." };
            let text = format!("{sign}{whole}{point}{fraction}e{places}");
            prop_assert_eq!(whole_number(&text), Some(number), "{}", text);
        }
    }
}
