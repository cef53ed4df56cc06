package io.github.tokenbroker.client;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.util.Optional;
import java.util.Set;

/**
 * The rules of adapters for HTTP libraries: where a token may go, and which answers say that it was
 * refused.
 */
public final class RefusedToken {
  /** The longest body of an answer, in bytes, in which a code is looked for. */
  public static final int LONGEST_BODY = 64 * 1024;

  private static final Set<String> TOKEN_CODES = Set.of("61003", "61004");

  private RefusedToken() {}

  /**
   * Checks that a token may be sent to a URL.
   *
   * @param token the token
   * @param target where the request goes
   * @throws TokenBrokerException with the kind WRONG_HOST if the scheme, host and port are not
   *     those of the token's API
   */
  public static void checkHost(Token token, URI target) {
    Origin expected = origin(token.apiBaseUrl());
    Origin actual = Origin.of(target);
    if (expected == null || !expected.equals(actual)) {
      throw TokenBrokerException.of(
              ErrorKind.WRONG_HOST,
              "the token is for " + expected + ", and is not sent to " + actual)
          .account(token.account())
          .build();
    }
  }

  /**
   * Returns the code with which the API refused a token.
   *
   * @param status the status of the answer
   * @param body the start of its body, which is complete if it has at most {@link #LONGEST_BODY}
   *     bytes
   * @return the code, or empty if the answer says something else
   */
  public static Optional<String> code(int status, byte[] body) {
    if (status < 400 || body.length > LONGEST_BODY) {
      return Optional.empty();
    }
    try {
      JsonElement json = JsonParser.parseString(new String(body, StandardCharsets.UTF_8));
      return code(member(json, "error")).or(() -> code(json)).filter(TOKEN_CODES::contains);
    } catch (JsonParseException noJson) {
      return Optional.empty();
    }
  }

  private static Optional<String> code(JsonElement json) {
    JsonElement code = member(json, "code");
    return code != null && code.isJsonPrimitive()
        ? Optional.of(code.getAsString())
        : Optional.empty();
  }

  private static JsonElement member(JsonElement json, String name) {
    return json instanceof JsonObject object ? object.get(name) : null;
  }

  private static Origin origin(String url) {
    try {
      return Origin.of(URI.create(url));
    } catch (IllegalArgumentException malformed) {
      return null;
    }
  }
}
