package io.github.tokenbroker.client.spring;

import io.github.tokenbroker.client.RefusedToken;
import io.github.tokenbroker.client.Token;
import java.net.URI;
import org.springframework.http.HttpHeaders;
import org.springframework.http.HttpStatusCode;

/** The check of answers that lead to another host. */
final class Redirects {
  private Redirects() {}

  /** Fails with WRONG_HOST if an answer is a redirect to another host than that of the API. */
  static void check(Token token, URI from, HttpStatusCode status, HttpHeaders headers) {
    URI location = status.is3xxRedirection() ? headers.getLocation() : null;
    if (location != null) {
      RefusedToken.checkHost(token, from.resolve(location));
    }
  }
}
