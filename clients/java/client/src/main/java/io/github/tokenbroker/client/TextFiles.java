package io.github.tokenbroker.client;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.Charset;
import java.nio.charset.StandardCharsets;
import java.nio.file.AccessDeniedException;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;

/**
 * Reads text files in the encodings that the tools of Windows write, and decides whether a path may
 * be printed.
 */
final class TextFiles {
  private TextFiles() {}

  /**
   * Returns the text of a file in UTF-8, or in UTF-16 with a byte order mark, and without such a
   * mark.
   *
   * @throws IOException whose text quotes neither the file nor a path that may be a secret
   */
  static String read(Path file) throws IOException {
    byte[] bytes;
    try {
      bytes = Files.readAllBytes(file);
    } catch (IOException unreadable) {
      // The exception's own text and its fields have the path.
      throw new IOException(shown(file) + " cannot be read: " + why(unreadable));
    }
    try {
      return text(bytes);
    } catch (CharacterCodingException malformed) {
      throw new IOException(shown(file) + " is malformed UTF-16");
    }
  }

  private static String why(IOException unreadable) {
    if (unreadable instanceof NoSuchFileException) {
      return "no such file";
    }
    return unreadable instanceof AccessDeniedException
        ? "access is denied"
        : "it is no readable file";
  }

  private static String text(byte[] bytes) throws CharacterCodingException {
    if (begins(bytes, 0xEF, 0xBB, 0xBF)) {
      return new String(bytes, 3, bytes.length - 3, StandardCharsets.UTF_8);
    }
    if (begins(bytes, 0xFF, 0xFE)) {
      return utf16(bytes, StandardCharsets.UTF_16LE);
    }
    if (begins(bytes, 0xFE, 0xFF)) {
      return utf16(bytes, StandardCharsets.UTF_16BE);
    }
    return new String(bytes, StandardCharsets.UTF_8);
  }

  private static boolean begins(byte[] bytes, int... mark) {
    for (int n = 0; n < mark.length; n++) {
      if (n >= bytes.length || (bytes[n] & 0xFF) != mark[n]) {
        return false;
      }
    }
    return true;
  }

  private static String utf16(byte[] bytes, Charset order) throws CharacterCodingException {
    ByteBuffer text = ByteBuffer.wrap(bytes, 2, bytes.length - 2);
    return order.newDecoder().decode(text).toString();
  }

  /**
   * Returns a path for an error or a log message: as it is if it exists or if its directory does,
   * and otherwise a text that does not contain it. A frequent mistake is to give the content of a
   * file, such as a bearer, instead of its path.
   */
  static String shown(Path file) {
    String text = file.toString();
    boolean isContent =
        // A path has no two slashes in a row, so this is what is left of a URL on Linux.
        text.chars().anyMatch(Character::isISOControl) || text.matches("\\w{2,}:/.*");
    // Neither base64 nor another key names a directory that exists, except the root, which has no
    // name, and the current one.
    Path directory = file.getParent();
    boolean leadsSomewhere =
        Files.exists(file, LinkOption.NOFOLLOW_LINKS)
            || (directory != null
                && directory.getFileName() != null
                && Files.isDirectory(directory));
    return !isContent && leadsSomewhere ? text : "(path not shown: nothing is there)";
  }
}
