// Headers and indexes of checkpoints in the form that libraries write, read at the speed of memory: models list 100,000
// tensors. What is otherwise in any way gives null, and a whole JSON parser in TypeScript decides what it is. Nothing is
// believed of the bytes but what was looked at, and every look is within them.
#include <napi.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string_view>
#include <vector>

namespace {

using Text = std::string_view;

uint64_t fold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Multiplies and folds as wyhash does, with keys that differ from process to process: names cannot be chosen to collide.
uint64_t hash_of(Text text) {
  static const auto keys = [] {
    std::random_device random;
    const auto key = [&] { return (static_cast<uint64_t>(random()) << 32) | random() | 1; };
    return std::vector<uint64_t>{key(), key(), key()};
  }();
  uint64_t hash = keys[0] ^ text.size();
  for (size_t at = 0; at < text.size(); at += 16) {
    uint64_t pair[2] = {0, 0};
    std::memcpy(pair, text.data() + at, std::min<size_t>(16, text.size() - at));
    hash = fold(pair[0] ^ keys[1], pair[1] ^ hash);
  }
  return fold(hash ^ keys[0], keys[2]);
}

// Texts and the number of each, in open addressing.
class Table {
 public:
  // The number of a text; where it is new, the next one.
  size_t number(Text text) {
    if (2 * (texts_.size() + 1) > slots_.size()) grow();
    size_t& slot = find(text);
    if (slot == 0) {
      texts_.push_back(text);
      slot = texts_.size();
    }
    return slot - 1;
  }
  // `size()` where it is not there.
  size_t look_up(Text text) {
    const size_t slot = slots_.empty() ? 0 : find(text);
    return slot == 0 ? size() : slot - 1;
  }
  size_t size() const { return texts_.size(); }

 private:
  std::vector<Text> texts_;
  std::vector<size_t> slots_;

  size_t& find(Text text) {
    const size_t last = slots_.size() - 1;
    size_t at = hash_of(text) & last;
    while (slots_[at] != 0 && texts_[slots_[at] - 1] != text) at = (at + 1) & last;
    return slots_[at];
  }
  void grow() {
    slots_.assign(slots_.empty() ? 64 : 2 * slots_.size(), 0);
    for (size_t i = 0; i < texts_.size(); i++) find(texts_[i]) = i + 1;
  }
};

class Cursor {
 public:
  Cursor(Text text, size_t at) : text_(text), at_(std::min(at, text.size())) {}

  size_t at() const { return at_; }
  bool ends() const { return at_ == text_.size(); }

  bool pass(Text literal) {
    if (text_.compare(at_, literal.size(), literal) != 0) return false;
    at_ += literal.size();
    return true;
  }
  void skip_space() {
    while (!ends() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) at_++;
  }
  // A string that is not empty, of ASCII that stands for itself; `name` is what is between the quotes.
  bool string(Text* name) {
    if (!pass("\"")) return false;
    const size_t start = at_;
    while (!ends() && text_[at_] >= 0x20 && text_[at_] < 0x7f && text_[at_] != '"' && text_[at_] != '\\') at_++;
    *name = text_.substr(start, at_ - start);
    return !name->empty() && pass("\"");
  }
  bool through(char last, Text* passed) {
    const size_t end = text_.find(last, at_);
    if (end == Text::npos) return false;
    *passed = text_.substr(at_, end + 1 - at_);
    at_ = end + 1;
    return true;
  }
  // 15 digits are exact; a leading zero is no JSON.
  bool count(double* value) {
    const size_t start = at_;
    uint64_t sum = 0;
    while (!ends() && text_[at_] >= '0' && text_[at_] <= '9' && at_ - start < 16) sum = 10 * sum + (text_[at_++] - '0');
    *value = static_cast<double>(sum);
    const size_t digits = at_ - start;
    return digits > 0 && digits <= 15 && (digits == 1 || text_[start] != '0');
  }

 private:
  Text text_;
  size_t at_;
};

Text bytes_of(const Napi::Value& value) {
  auto bytes = value.As<Napi::Uint8Array>();
  return {reinterpret_cast<const char*>(bytes.Data()), bytes.ByteLength()};
}

template <class Array, class T>
Array given(Napi::Env env, const std::vector<T>& values) {
  auto array = Array::New(env, values.size());
  if (!values.empty()) std::memcpy(array.Data(), values.data(), values.size() * sizeof(T));
  return array;
}

// Positions in a text, as what Int32Array holds.
class Places {
 public:
  explicit Places(Text text) : start_(text.data()) {}
  void add(Text part) {
    places_.push_back(static_cast<int32_t>(part.data() - start_));
    places_.push_back(static_cast<int32_t>(part.data() - start_ + part.size()));
  }
  Napi::Value given_to(Napi::Env env) const { return given<Napi::Int32Array>(env, places_); }

 private:
  const char* start_;
  std::vector<int32_t> places_;
};

// header(bytes, at): of `"name":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}, ...}` and spaces, from the first name
// on: names [begin, end] in the bytes, forms [begin, end] (`:{"dtype":"BF16","shape":[2,3]`; one may be there more than
// once), the form of each tensor, offsets [begin, end]. Null also where a name is there twice.
Napi::Value scan_header(const Napi::CallbackInfo& info) {
  const auto env = info.Env();
  const Text text = bytes_of(info[0]);
  if (text.size() > INT32_MAX) return env.Null();
  Cursor cursor(text, info[1].As<Napi::Number>().Uint32Value());
  Places names(text), forms(text);
  std::vector<int32_t> form_of;
  std::vector<double> offsets;
  Table known;
  struct Form {
    Text written;
    int32_t number;
  };
  std::vector<Form> recent;
  constexpr size_t most_recent = 8;
  int32_t form_count = 0;
  do {
    Text name;
    if (!cursor.string(&name)) return env.Null();
    if (known.number(name) != form_of.size()) return env.Null();
    names.add(name);
    size_t i = 0;
    while (i < recent.size() && !cursor.pass(recent[i].written)) i++;
    if (i == recent.size()) {
      Text written;
      if (!cursor.through(']', &written)) return env.Null();
      if (recent.size() == most_recent) recent.pop_back();
      recent.insert(recent.begin(), {written, form_count++});
      forms.add(written);
      i = 0;
    }
    form_of.push_back(recent[i].number);
    double begin, end;
    if (!cursor.pass(",\"data_offsets\":[") || !cursor.count(&begin) || !cursor.pass(",") || !cursor.count(&end) || !cursor.pass("]}")) {
      return env.Null();
    }
    offsets.push_back(begin);
    offsets.push_back(end);
  } while (cursor.pass(","));
  if (!cursor.pass("}")) return env.Null();
  while (cursor.pass(" ")) {
  }
  if (!cursor.ends()) return env.Null();
  auto result = Napi::Object::New(env);
  result.Set("names", names.given_to(env));
  result.Set("forms", forms.given_to(env));
  result.Set("formOf", given<Napi::Int32Array>(env, form_of));
  result.Set("offsets", given<Napi::Float64Array>(env, offsets));
  return result;
}

// index(bytes, at): of `"name": "file", ...}` from the first name on: files [begin, end] in the bytes, the names [begin, end]
// that stand for each, and where the `}` ends. Null also where a name is there twice.
Napi::Value scan_index(const Napi::CallbackInfo& info) {
  const auto env = info.Env();
  const Text text = bytes_of(info[0]);
  if (text.size() > INT32_MAX) return env.Null();
  Cursor cursor(text, info[1].As<Napi::Number>().Uint32Value());
  Places files(text);
  std::vector<Places> names;
  Table known, all;
  size_t count = 0;
  Text last;  // with its quotes: mostly the next one's too
  size_t file = 0;
  do {
    Text name, of;
    cursor.skip_space();
    if (!cursor.string(&name) || all.number(name) != count++) return env.Null();
    cursor.skip_space();
    if (!cursor.pass(":")) return env.Null();
    cursor.skip_space();
    if (last.empty() || !cursor.pass(last)) {
      if (!cursor.string(&of)) return env.Null();
      last = Text(of.data() - 1, of.size() + 2);
      file = known.number(of);
      if (file == names.size()) {
        names.emplace_back(text);
        files.add(of);
      }
    }
    names[file].add(name);
    cursor.skip_space();
  } while (cursor.pass(","));
  if (!cursor.pass("}")) return env.Null();
  auto result = Napi::Object::New(env);
  result.Set("files", files.given_to(env));
  auto lists = Napi::Array::New(env, names.size());
  for (uint32_t i = 0; i < names.size(); i++) lists.Set(i, names[i].given_to(env));
  result.Set("names", lists);
  result.Set("end", static_cast<double>(cursor.at()));
  return result;
}

// holdsEach(bytes, names, bytes of others, their names): whether each of the others is among the names, and none of them
// is there twice.
Napi::Value holds_each(const Napi::CallbackInfo& info) {
  const auto env = info.Env();
  bool sound = true;
  const auto each = [&](int bytes, auto use) {
    const Text text = bytes_of(info[bytes]);
    auto places = info[bytes + 1].As<Napi::Int32Array>();
    for (size_t i = 0; sound && i + 1 < places.ElementLength(); i += 2) {
      const int32_t from = places[i], to = places[i + 1];
      sound = 0 <= from && from <= to && static_cast<size_t>(to) <= text.size() && use(text.substr(from, to - from));
    }
  };
  Table names;
  each(0, [&](Text name) { return names.number(name), true; });
  std::vector<bool> seen(names.size());
  each(2, [&](Text name) {
    const size_t i = names.look_up(name);
    if (i == names.size() || seen[i]) return false;
    seen[i] = true;
    return true;
  });
  return Napi::Boolean::New(env, sound);
}

}  // namespace

Napi::Object define_scanner(Napi::Env env) {
  auto scanner = Napi::Object::New(env);
  scanner.Set("header", Napi::Function::New(env, scan_header, "header"));
  scanner.Set("index", Napi::Function::New(env, scan_index, "index"));
  scanner.Set("holdsEach", Napi::Function::New(env, holds_each, "holdsEach"));
  return scanner;
}
