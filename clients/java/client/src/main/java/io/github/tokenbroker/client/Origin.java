package io.github.tokenbroker.client;

import java.net.URI;
import java.util.Locale;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * The scheme, host and port of a URL, in one form. {@link URI} itself does not find a host with an
 * underscore, as Docker gives its containers.
 *
 * @param scheme the scheme
 * @param host the host; in brackets if it is an IPv6 address
 * @param port the port
 */
record Origin(String scheme, String host, int port) {
  private static final Pattern AUTHORITY =
      Pattern.compile("(?:[^@]*@)?(\\[[^\\[\\]@]+\\]|[^\\[\\]:@]+)(?::(\\d{0,5}))?");

  private static final int LAST_PORT = 65_535;

  /** Returns the origin of a URL, with the scheme's own port if it names none; null without one. */
  static Origin of(URI url) {
    if (url.getScheme() == null || url.getRawAuthority() == null) {
      return null;
    }
    String scheme = url.getScheme().toLowerCase(Locale.ROOT);
    Matcher parts = AUTHORITY.matcher(url.getRawAuthority());
    if (!parts.matches()) {
      return null;
    }
    boolean named = parts.group(2) != null && !parts.group(2).isEmpty();
    int port = named ? Integer.parseInt(parts.group(2)) : scheme.equals("https") ? 443 : 80;
    return port == 0 || port > LAST_PORT
        ? null
        : new Origin(scheme, parts.group(1).toLowerCase(Locale.ROOT), port);
  }

  /** Returns the host and the port. */
  String authority() {
    return host + ":" + port;
  }

  @Override
  public String toString() {
    return scheme + "://" + authority();
  }
}
