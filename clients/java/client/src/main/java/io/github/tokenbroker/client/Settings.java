package io.github.tokenbroker.client;

import java.net.URI;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;

/**
 * Checked settings of a client. Files are null if they are not set.
 *
 * @param endpoints the URLs of the broker
 * @param bearerFile the file with the bearer
 * @param caFile the file with the certificates to trust
 * @param clientCertFile the file with the client's certificate
 * @param clientKeyFile the file with its key
 * @param timeout how long a call waits that has no timeout of its own
 */
record Settings(
    List<URI> endpoints,
    Path bearerFile,
    Path caFile,
    Path clientCertFile,
    Path clientKeyFile,
    Duration timeout) {

  /** Checks settings. */
  static Settings from(TokenClient.Builder builder) {
    List<URI> endpoints = builder.endpoints.stream().map(Settings::endpoint).toList();
    if (endpoints.isEmpty()) {
      throw Errors.invalid("no endpoint is set");
    }
    String scheme = endpoints.get(0).getScheme();
    if (!endpoints.stream().allMatch(endpoint -> endpoint.getScheme().equals(scheme))) {
      throw Errors.invalid("all endpoints must have the same scheme");
    }
    if ((builder.clientCertFile == null) != (builder.clientKeyFile == null)) {
      throw Errors.invalid("the client's certificate and its key must be set together");
    }
    boolean secure = scheme.equals("https");
    if (!secure && (builder.caFile != null || builder.clientCertFile != null)) {
      throw Errors.invalid("certificates are set, but the endpoints are not https");
    }
    if (!secure && builder.bearerFile != null && !builder.plaintextBearerAllowed) {
      endpoints.stream()
          .filter(endpoint -> !isLoopback(endpoint))
          .findFirst()
          .ifPresent(
              endpoint -> {
                throw Errors.invalid(
                    "the bearer would be sent unencrypted to "
                        + endpoint.getAuthority()
                        + ": use https, or call allowPlaintextBearer");
              });
    }
    if (builder.timeout.isNegative() || builder.timeout.isZero()) {
      throw Errors.invalid("the timeout must be above zero");
    }
    return new Settings(
        endpoints,
        builder.bearerFile,
        builder.caFile,
        builder.clientCertFile,
        builder.clientKeyFile,
        builder.timeout);
  }

  boolean secure() {
    return endpoints.get(0).getScheme().equals("https");
  }

  private static URI endpoint(String text) {
    URI uri;
    try {
      uri = URI.create(text);
    } catch (IllegalArgumentException malformed) {
      throw Errors.invalid("an endpoint must have the form http://host:port or https://host:port");
    }
    boolean knownScheme = "http".equals(uri.getScheme()) || "https".equals(uri.getScheme());
    String path = uri.getPath();
    boolean bare =
        (path == null || path.isEmpty() || path.equals("/"))
            && uri.getUserInfo() == null
            && uri.getQuery() == null
            && uri.getFragment() == null;
    if (!knownScheme || uri.getHost() == null || !bare) {
      throw Errors.invalid("an endpoint must have the form http://host:port or https://host:port");
    }
    int port = uri.getPort() >= 0 ? uri.getPort() : uri.getScheme().equals("https") ? 443 : 80;
    return URI.create(uri.getScheme() + "://" + uri.getHost() + ":" + port);
  }

  private static boolean isLoopback(URI endpoint) {
    String host = endpoint.getHost();
    return host.equals("localhost") || host.equals("[::1]") || host.matches("127(\\.\\d{1,3}){3}");
  }
}
